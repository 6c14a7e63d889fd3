"""Tensors out of a checkpoint that was found whole, resharded to whatever this rank holds of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from titan_ckpt.chunks import Chunk, chunk_key
from titan_ckpt.index import Index, read_index
from titan_ckpt.mapped_file import MappedFile
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
        self._files: dict[str, MappedFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def fill(self, chunks: Iterable[Chunk]) -> None:
        """Copy the stored values into the chunks' data, wherever the boundaries of the stored chunks are."""
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        for chunk in chunks:
            stored = self.index[chunk.name]
            files = {stored_chunk.offsets: stored_chunk.file for stored_chunk in stored.chunks}
            for item in create_read_items_for_chunk_list(chunk.name, stored.boxes(), [chunk.box]):
                offsets = tuple(item.storage_index.offset or ())
                source = self._open(files[offsets]).tensor(chunk_key(chunk.name, offsets))
                target = chunk.data[_slices(item.dest_offsets, item.lengths)]
                target.copy_(source[_slices(item.storage_offsets, item.lengths)])

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        stored = self.index[name]
        data = torch.empty(stored.shape, dtype=stored.torch_dtype)
        self.fill([Chunk(name, stored.shape, (0,) * len(stored.shape), data)])
        return data

    def _open(self, file: str) -> MappedFile:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(MappedFile(self._folder / file))
        return self._files[file]


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
