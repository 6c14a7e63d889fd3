"""The index of a checkpoint: dtype and shape of each tensor, and the file of each of its chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.format.chunk_coverage import find_coverage_error
from titan_ckpt.format.chunks import Chunk, chunk_key
from titan_ckpt.format.durable_files import INDEX, encode_json
from titan_ckpt.format.regular_file import read_json
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES, DTYPES
from titan_ckpt.format.schema import MAX_INT64, to_file_name, to_integers, to_list, to_object

if TYPE_CHECKING:  # takes a second to import: deferred to the first save or load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, from `offsets` on and of `sizes`, and the file that contains it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str

    def key(self, tensor: str) -> str:
        """Return the name of this chunk of `tensor` in its file."""
        return chunk_key(tensor, self.offsets)


@dataclass(frozen=True)
class StoredTensor:
    """A full tensor in a checkpoint; `dtype` is the safetensors name of its dtype."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return DTYPES[self.dtype]

    def boxes(self) -> TensorStorageMetadata:
        """Return the chunks in the format of DCP's resharding, in the same order."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in self.chunks]
        return TensorStorageMetadata(TensorProperties(dtype=self.torch_dtype), torch.Size(self.shape), boxes)


Index = dict[str, StoredTensor]


def index_of(chunks: Iterable[Chunk], file: str) -> Index:
    """Return the index of the chunks that one rank writes to `file`."""
    return {
        chunk.name: StoredTensor(
            DTYPE_NAMES[chunk.data.dtype], chunk.shape, (StoredChunk(chunk.offsets, tuple(chunk.data.shape), file),)
        )
        for chunk in chunks
    }


def join_indices(indices: Iterable[Index]) -> Index:
    """Return the index of the chunks of all ranks.

    Raises:
        CheckpointError: if ranks disagree on the shape or the dtype of a tensor, or their chunks do not cover it
            exactly once.
    """
    joined: Index = {}
    for index in indices:
        for name, tensor in index.items():
            known = joined.get(name, StoredTensor(tensor.dtype, tensor.shape, ()))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"{name} must have the same dtype and shape on all ranks, got {known.dtype} {known.shape} on one "
                    f"rank and {tensor.dtype} {tensor.shape} on another. Rename one of them if they are different "
                    "tensors."
                )
            joined[name] = StoredTensor(tensor.dtype, tensor.shape, known.chunks + tensor.chunks)
    for name, tensor in joined.items():
        problem = find_coverage_error(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks])
        written, size = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
        if problem:
            raise CheckpointError(
                f"Chunks of {name} must cover its {size} elements exactly once, got {written} elements in {problem}."
            )
    return joined


def encode_index(index: Index) -> bytes:
    """Return the index as the content of its file."""
    data = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "chunks": [vars(chunk) for chunk in tensor.chunks]}
        for name, tensor in sorted(index.items())
    }
    return encode_json(data)


def read_index(folder: Path) -> Index:
    """Return the index of a checkpoint.

    Raises:
        BrokenCheckpoint: if it is not a valid index, or the chunks of a tensor do not cover it exactly once.
        CheckpointError: if the disk fails.
    """
    data = to_object(read_json(folder / INDEX, MAX_INT64), INDEX)
    return {name: _tensor(entry, name) for name, entry in data.items()}


def _tensor(data: Any, name: str) -> StoredTensor:
    to_object(data, name, ("dtype", "shape", "chunks"))
    if not isinstance(data["dtype"], str) or data["dtype"] not in DTYPES:
        raise BrokenCheckpoint(f"{name} has the unknown dtype {data['dtype']!r:.40}")
    chunks = tuple(_chunk(chunk, name) for chunk in to_list(data["chunks"], f"the chunks of {name}"))
    tensor = StoredTensor(data["dtype"], to_integers(data["shape"], f"the shape of {name}"), chunks)
    problem = find_coverage_error(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    if problem:
        raise BrokenCheckpoint(f"{name} of shape {list(tensor.shape)} has {problem}")
    return tensor


def _chunk(data: Any, name: str) -> StoredChunk:
    to_object(data, f"a chunk of {name}", ("offsets", "sizes", "file"))
    return StoredChunk(
        to_integers(data["offsets"], f"the offsets of {name}"),
        to_integers(data["sizes"], f"the sizes of {name}"),
        to_file_name(data["file"], f"the file of {name}"),
    )
