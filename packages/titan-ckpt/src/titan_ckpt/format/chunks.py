"""The mapping of a tensor that this rank holds, and where it belongs in the whole."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # a second of imports: left to the first save or load
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor `name`: `data` holds the elements from `offsets` on; `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def key(self) -> str:
        """The chunk's name in a file."""
        return chunk_key(self.name, self.offsets)

    @property
    def box(self) -> ChunkStorageMetadata:
        """The chunk's place, as DCP's resharding knows it."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.data.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The chunk's place, as an index into the whole tensor."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.data.shape, strict=True))

    def holding(self, data: Tensor) -> Chunk:
        """The same place with other data."""
        return replace(self, data=data)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a `DTensor`, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def chunk_key(name: str, offsets: tuple[int, ...]) -> str:
    """A chunk's name in a file: `model.weight@0,128`."""
    return f"{name}@{','.join(map(str, offsets))}"


def local_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """Return what this rank holds of each tensor, sharing memory; tensors of which it holds nothing are left out.

    Raises:
        RuntimeError: (torch's) for a DTensor with a Partial placement: its values do not exist until they are summed.
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
    """Whether this rank is the one among the replicas of its mapping of a DTensor that writes it; spread by name."""
    if not is_dtensor(tensor):
        return True
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    turn = zlib.crc32(name.encode())
    return all(
        coordinate[axis] == turn % tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )
