"""The chunk of a tensor that this rank holds, and its place in the full tensor."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # takes a second to import: deferred to the first save or load
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor `name`: `data` starts at `offsets` of the full tensor, whose shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def key(self) -> str:
        """Name of the chunk in a safetensors file."""
        return chunk_key(self.name, self.offsets)

    @property
    def box(self) -> ChunkStorageMetadata:
        """Place of the chunk, in the format of DCP's resharding."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.data.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Place of the chunk, as an index into the full tensor."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.data.shape, strict=True))

    def holding(self, data: Tensor) -> Chunk:
        """Return a chunk with the same place and other data."""
        return replace(self, data=data)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether `tensor` is a `DTensor`, without importing `torch.distributed.tensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def chunk_key(name: str, offsets: tuple[int, ...]) -> str:
    """Return the name of a chunk in a safetensors file, such as `model.weight@0,128`."""
    return f"{name}@{','.join(map(str, offsets))}"


def local_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """Return the chunk that this rank holds of each tensor, sharing memory; tensors without a local chunk are omitted.

    Raises:
        RuntimeError: raised by torch for a DTensor with a Partial placement, whose values do not exist before they are
            reduced.
    """
    chunks = {}
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            if tensor.device_mesh.get_coordinate() is None:
                continue
            (box,) = tensor.__create_chunk_list__()
            chunk = Chunk(name, tuple(tensor.shape), tuple(box.offsets), tensor.to_local().detach())
        else:
            chunk = Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach())
        if chunk.data.numel() or not math.prod(chunk.shape):
            chunks[name] = chunk
    return chunks


def is_writer(name: str, tensor: Tensor) -> bool:
    """Return whether this rank writes `tensor`: one replica of each shard of a DTensor does, chosen by name."""
    if not is_dtensor(tensor):
        return True
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    turn = zlib.crc32(name.encode())
    return all(
        coordinate[axis] == turn % tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )
