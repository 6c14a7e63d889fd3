"""The index of a checkpoint: of each tensor its type, its shape, and which file holds which box of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.format.chunk_coverage import misfit
from titan_ckpt.format.chunks import Chunk, chunk_key
from titan_ckpt.format.durable_files import INDEX, encode_json
from titan_ckpt.format.regular_file import read_json
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES, DTYPES
from titan_ckpt.format.schema import LARGEST, to_file_name, to_integers, to_list, to_object

if TYPE_CHECKING:  # a second of imports: left to the first save or load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata


@dataclass(frozen=True)
class StoredChunk:
    """Which file holds the box of a tensor that begins at `offsets` and has `sizes`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str

    def key(self, tensor: str) -> str:
        """The chunk's name in its file, as one of the tensor of that name."""
        return chunk_key(tensor, self.offsets)


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor in a checkpoint; `dtype` is safetensors' name of the type."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch knows it."""
        return DTYPES[self.dtype]

    def boxes(self) -> TensorStorageMetadata:
        """The chunks as DCP's resharding knows them, in the same order."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in self.chunks]
        return TensorStorageMetadata(TensorProperties(dtype=self.torch_dtype), torch.Size(self.shape), boxes)


Index = dict[str, StoredTensor]


def index_of(chunks: Iterable[Chunk], file: str) -> Index:
    """Return the index of what one rank wrote to `file`."""
    return {
        chunk.name: StoredTensor(
            DTYPE_NAMES[chunk.data.dtype], chunk.shape, (StoredChunk(chunk.offsets, tuple(chunk.data.shape), file),)
        )
        for chunk in chunks
    }


def join_indices(indices: Iterable[Index]) -> Index:
    """Return the index of what all ranks wrote.

    Raises:
        CheckpointError: when ranks disagree on a tensor's shape or type, or their chunks do not fill it exactly.
    """
    joined: Index = {}
    for index in indices:
        for name, tensor in index.items():
            known = joined.get(name, StoredTensor(tensor.dtype, tensor.shape, ()))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"Got {name} as {known.dtype} {known.shape} on one rank and as {tensor.dtype} {tensor.shape} on "
                    f"another. A tensor must be of one type and shape on all ranks. Give them different names if they "
                    f"are different."
                )
            joined[name] = StoredTensor(tensor.dtype, tensor.shape, known.chunks + tensor.chunks)
    for name, tensor in joined.items():
        problem = misfit(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks])
        written, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
        if problem:
            raise CheckpointError(
                f"Chunks of {name} must fill its {whole} elements exactly once, got {written} in {problem}."
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
        BrokenCheckpoint: when it is not of that form, or the chunks of a tensor do not fill it exactly once.
        CheckpointError: when the disk fails.
    """
    data = to_object(read_json(folder / INDEX, LARGEST), INDEX)
    return {name: _tensor(entry, name) for name, entry in data.items()}


def _tensor(data: Any, name: str) -> StoredTensor:
    to_object(data, name, ("dtype", "shape", "chunks"))
    if not isinstance(data["dtype"], str) or data["dtype"] not in DTYPES:
        raise BrokenCheckpoint(f"{name} is of the type {data['dtype']!r:.40}")
    chunks = tuple(_chunk(chunk, name) for chunk in to_list(data["chunks"], f"the chunks of {name}"))
    tensor = StoredTensor(data["dtype"], to_integers(data["shape"], f"the shape of {name}"), chunks)
    problem = misfit(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
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
