"""A folder of Hugging Face weights, as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.format.safetensors_reader import MappedFile
from titan_ckpt.format.strict_json import is_there, read_json
from titan_ckpt.hugging_face.adapter import WeightMapping
from titan_ckpt.hugging_face.weight_files import INDEX, folder_of, weight_files
from titan_ckpt.paths import local_path

CONFIG = "config.json"


class HFReader:
    """The tensors of the safetensors files in a folder, and its `config.json` (None: there is none).

    Where there is an index, its files are the folder's. A file in place of the folder says which of two sets of weights
    to take: an index, or a safetensors file. A context manager that keeps the files open.

    Raises:
        CheckpointError: when there are none or two sets, one is not whole, or the index names tensors that they do not
            have.
    """

    def __init__(self, path: Path) -> None:
        path = local_path(path, "The folder of Hugging Face weights")
        config = folder_of(path) / CONFIG
        self.config: dict[str, Any] | None = read_json(config) if is_there(config) else None
        files, known = weight_files(path)
        self._stand_ins: dict[str, Tensor] = {}
        self._file_of: dict[str, MappedFile] = {}
        with ExitStack() as opened:
            for each in files:
                self._add(each, opened.enter_context(MappedFile(each)), known)
            self._stack = opened.pop_all()

    def _add(self, path: Path, file: MappedFile, known: Mapping[str, str]) -> None:
        found = file.stand_ins()
        absent = [key for key, name in known.items() if name == path.name and key not in found]
        if absent or found.keys() & self._file_of.keys():
            raise CheckpointError(
                f"A file must hold the tensors that {INDEX} names for it, once, got {path}, which lacks "
                f"{listed(absent) or 'none'} and repeats "
                f"{listed(sorted(found.keys() & self._file_of.keys())) or 'none'} of other files. Download or export "
                "the folder again."
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

    def read(self, mapping: WeightMapping) -> list[Tensor]:
        """The tensors of a mapping, of which that is read which is looked at."""
        return [self._file_of[key].tensor(key) for key in mapping.hf_names]
