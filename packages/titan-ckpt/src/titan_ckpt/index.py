"""The index of a checkpoint: of each tensor its type, its shape, and which file holds which box of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titan_ckpt.chunks import Chunk
from titan_ckpt.errors import CheckpointError
from titan_ckpt.files import encode_json
from titan_ckpt.tensor_file import DTYPE_NAMES, DTYPES

if TYPE_CHECKING:  # a second of imports: left to the first save or load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

INDEX = "tensors.json"


@dataclass(frozen=True)
class StoredChunk:
    """Which file holds the box of a tensor that begins at `offsets` and has `sizes`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


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
        written, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
        if written != whole:
            raise CheckpointError(
                f"Got {written} elements of {name}, which has {whole}. The ranks' chunks must fill a tensor exactly "
                f"once. Save on all ranks that hold a part of it."
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
    """Return the index of a checkpoint that was found whole."""

    def tensor(data: dict[str, Any]) -> StoredTensor:
        chunks = tuple(StoredChunk(tuple(c["offsets"]), tuple(c["sizes"]), c["file"]) for c in data["chunks"])
        return StoredTensor(data["dtype"], tuple(data["shape"]), chunks)

    return {name: tensor(data) for name, data in json.loads((folder / INDEX).read_bytes()).items()}
