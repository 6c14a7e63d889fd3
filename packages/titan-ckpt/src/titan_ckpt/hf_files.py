"""A folder of safetensors files as Hugging Face lays it out."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_ckpt.errors import CheckpointError
from titan_ckpt.files import publish, write_json
from titan_ckpt.ranks import Ranks
from titan_ckpt.tensor_file import DTYPES, write_tensors

INDEX = "model.safetensors.index.json"


class HFReader:
    """The tensors of all safetensors files in a folder; a context manager that keeps the files open.

    Raises:
        CheckpointError: when there are none, one cannot be read, or the index (where there is one) names others.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        index = folder / INDEX
        known = _read_index(index) if index.is_file() else None
        paths = (
            sorted(folder.glob("*.safetensors"))
            if known is None
            else sorted({folder / name for name in known.values()})
        )
        if not paths:
            raise CheckpointError(
                f"Got {folder}, which has no safetensors files. A folder of Hugging Face weights has "
                f"model.safetensors, or several files and {INDEX}. Give the folder that holds them."
            )
        for path in paths:
            self._open(path)
        if known is not None and set(known) - set(self._file_of):
            raise CheckpointError(
                f"Got {sorted(set(known) - set(self._file_of))} in {index}, and no file has them. The folder must be "
                f"whole. Download or export it again."
            )

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Got {path}, which cannot be read: {error}. Every file of the folder must be whole. Download or "
                f"export it again."
            ) from error
        self._file_of.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def stand_ins(self) -> dict[str, Tensor]:
        """All tensors on the meta device: their names, shapes and types."""
        slices = {key: file.get_slice(key) for key, file in self._file_of.items()}
        return {
            key: torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
            for key, part in slices.items()
        }

    def read(self, key: str) -> Tensor:
        """A whole tensor."""
        return self._file_of[key].get_tensor(key)

    def read_box(self, key: str, box: tuple[slice, ...]) -> Tensor:
        """A part of a tensor; only that part is read."""
        return self._file_of[key].get_slice(key)[box]


def _read_index(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Got {path}, which cannot be read: {error!r}. It must be JSON with a weight_map. "
            "Download or export it again."
        ) from error


def write_folder(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
    max_file_bytes: int,
    ranks: Ranks,
) -> None:
    """Write tensors as `model-00001-of-00002.safetensors` and so on, with their index and `config.json`.

    Every rank calls `read(key)` once for each key of `sizes` (its bytes), in order; rank 0 writes. The folder gets its
    name when it is complete.
    """

    def write(action: Callable[[], Any]) -> None:
        ranks.together(lambda: action() if ranks.is_first else None)

    temporary = folder.with_name(f"{folder.name}.saving-{uuid.uuid4().hex[:8]}")
    write(lambda: temporary.mkdir(parents=True))
    groups = _groups(sizes, max_file_bytes)
    weight_map: dict[str, str] = {}
    for place, keys in enumerate(groups, start=1):
        name = f"model-{place:05}-of-{len(groups):05}.safetensors"
        weight_map.update(dict.fromkeys(keys, name))
        tensors = {key: read(key) for key in keys}
        write(partial(write_tensors, temporary / name, tensors, {"format": "pt"}))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write(lambda: write_json(temporary / INDEX, index))
    write(lambda: write_json(temporary / "config.json", dict(config)))
    write(lambda: publish(temporary, folder))


def _groups(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    return groups
