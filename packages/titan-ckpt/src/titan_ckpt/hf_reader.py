"""A folder of Hugging Face weights, as it is read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from titan_ckpt.adapter import Piece
from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.mapped_file import MappedFile

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


class HFReader:
    """The tensors of the safetensors files in a folder, and its `config.json` (None: there is none).

    Where there is an index, its files are the folder's. A context manager that keeps the files open.

    Raises:
        CheckpointError: when there are none, one is not whole, or the index names tensors that they do not have.
    """

    def __init__(self, folder: Path) -> None:
        config = folder / CONFIG
        self.config: dict[str, Any] | None = _read_json(config) if config.is_file() else None
        index = folder / INDEX
        known: dict[str, str] = _read_json(index, "weight_map") if index.is_file() else {}
        if not all(isinstance(name, str) for name in known.values()):
            raise CheckpointError(f"Got {index}, whose weight_map must hold names of files alone. Download it again.")
        listed_there = {folder / name for name in known.values()}
        paths = sorted(listed_there if index.is_file() else folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"Got {folder}, which has no safetensors files. A folder of Hugging Face weights has "
                f"model.safetensors, or several files and {INDEX}. Give the folder that holds them."
            )
        self._stack = ExitStack()
        self._stand_ins: dict[str, Tensor] = {}
        self._file_of: dict[str, MappedFile] = {}
        for path in paths:
            file = self._stack.enter_context(MappedFile(path))
            found = file.stand_ins()
            absent = [key for key, name in known.items() if folder / name == path and key not in found]
            if absent or found.keys() & self._file_of.keys():
                raise CheckpointError(
                    f"Got {path}, which lacks {listed(absent) or 'nothing'} of what {INDEX} says is there, and repeats "
                    f"{listed(sorted(found.keys() & self._file_of.keys())) or 'nothing'} of other files. The folder "
                    f"must be whole. Download or export it again."
                )
            self._stand_ins |= found
            self._file_of |= dict.fromkeys(found, file)

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def stand_ins(self) -> dict[str, Tensor]:
        """All tensors on the meta device: their names, shapes and types."""
        return self._stand_ins

    def read(self, piece: Piece) -> list[Tensor]:
        """The tensors of a piece, of which that is read which is looked at."""
        return [self._file_of[key].tensor(key) for key in piece.hf_names]


def _read_json(path: Path, key: str | None = None) -> dict[str, Any]:
    """A JSON object from a file, or the one that is its value of `key`."""
    try:
        data = json.loads(path.read_bytes())
        data = data if key is None else data[key]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Got {path}, which cannot be read: {error!r}. It must be JSON{f' with a {key}' if key else ''}. "
            "Download or export it again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"Got {path}, which holds a {type(data).__name__}. It must be an object. Download or export it again."
        )
    return data
