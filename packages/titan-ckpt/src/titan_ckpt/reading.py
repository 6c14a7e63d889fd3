"""Tensors out of a checkpoint that was found whole, resharded to whatever this rank holds of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from titan_ckpt.chunks import Chunk, chunk_key
from titan_ckpt.index import Index, StoredTensor, read_index
from titan_ckpt.saving import CONFIG, STATE


def read_values(folder: Path) -> dict[str, Any]:
    """Return the JSON values of a checkpoint, by part."""
    return json.loads((folder / STATE).read_bytes())


def read_config(folder: Path) -> Any:
    """Return the config of the run that saved a checkpoint, as plain data (None: it saved none)."""
    return json.loads((folder / CONFIG).read_bytes())


class TensorReader:
    """Reads boxes of a checkpoint's tensors; a context manager that keeps the files open.

    >>> with TensorReader(Path("checkpoint/step-20")) as reader:   # doctest: +SKIP
    ...     weight = reader.read("model.norm.weight")
    """

    def __init__(self, folder: Path) -> None:
        self.index: Index = read_index(folder)
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def fill(self, chunks: Iterable[Chunk]) -> None:
        """Copy the stored values into the chunks' data, wherever the boundaries of the stored chunks are."""
        for chunk in chunks:
            stored = self.index[chunk.name]
            for item in create_read_items_for_chunk_list(chunk.name, stored.boxes(), [chunk.box]):
                source = self._box(chunk.name, stored, item.storage_index.index, item.storage_offsets, item.lengths)
                target = chunk.data[_slices(item.dest_offsets, item.lengths)]
                target.copy_(source)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        stored = self.index[name]
        data = torch.empty(stored.shape, dtype=stored.torch_dtype)
        self.fill([Chunk(name, stored.shape, (0,) * len(stored.shape), data)])
        return data

    def _box(self, name: str, stored: StoredTensor, place: int, offsets: torch.Size, lengths: torch.Size) -> Tensor:
        chunk = stored.chunks[place]
        if chunk.file not in self._files:
            self._files[chunk.file] = self._stack.enter_context(safe_open(self._folder / chunk.file, framework="pt"))
        return self._files[chunk.file].get_slice(chunk_key(name, chunk.offsets))[_slices(offsets, lengths)]


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
