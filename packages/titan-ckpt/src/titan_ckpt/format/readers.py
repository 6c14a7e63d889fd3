"""Readers of a verified checkpoint: JSON values, config, and tensors resharded to the chunks of this rank."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from titan_ckpt.errors import BrokenCheckpoint
from titan_ckpt.format.chunks import Chunk, chunk_key
from titan_ckpt.format.durable_files import CONFIG, STATE
from titan_ckpt.format.encoding import decode
from titan_ckpt.format.index import Index, read_index
from titan_ckpt.format.regular_file import read_json
from titan_ckpt.format.safetensors_reader import MappedFile, open_mapped
from titan_ckpt.format.schema import MAX_INT64, to_object
from titan_ckpt.paths import local_path


def read_values(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the JSON values of a checkpoint, by part.

    Raises:
        BrokenCheckpoint: if they are not valid.
        CheckpointError: if the disk fails.
    """
    parts = to_object(read_json(folder / STATE, MAX_INT64, constants=True), STATE)
    values = {name: to_object(values, f"the part {name!r:.40}") for name, values in parts.items()}
    try:
        for value in values.values():
            decode(value)
    except (RecursionError, KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpoint(f"{STATE} cannot be read: {error}") from error
    return values


def read_config(folder: Path) -> Any:
    """Return the config of the run that saved a checkpoint, as plain data; None if none was saved.

    Raises:
        BrokenCheckpoint: if it is neither an object nor null.
        CheckpointError: if the disk fails.
    """
    folder = local_path(folder, "checkpoint")
    config = read_json(folder / CONFIG, MAX_INT64, constants=True)
    return None if config is None else to_object(config, CONFIG)


class TensorReader:
    """Reads tensors of a checkpoint; a context manager that keeps the files open.

    >>> with TensorReader(Path("checkpoint/step-20")) as reader:   # doctest: +SKIP
    ...     weight = reader.read("model.norm.weight")
    """

    def __init__(self, folder: Path) -> None:
        self._folder = local_path(folder, "checkpoint")
        self.index: Index = read_index(self._folder)
        self._files: dict[str, MappedFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def fill(self, chunks: Iterable[Chunk]) -> None:
        """Copy stored values into the data of `chunks`, which need not match the boundaries of the stored chunks."""
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
        """Return a full tensor, on the CPU."""
        stored = self.index[name]
        data = torch.empty(stored.shape, dtype=stored.torch_dtype)
        self.fill([Chunk(name, stored.shape, (0,) * len(stored.shape), data)])
        return data

    def _open(self, file: str) -> MappedFile:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(open_mapped(self._folder / file))
        return self._files[file]


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
