"""The local shard of a parameter. The only file that uses private APIs of `DTensor`."""

from __future__ import annotations

from torch import Tensor, nn


def local_shard(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the local shard of `parameter` and its offsets in each dim. A plain tensor is its own shard."""
    if type(parameter) in (Tensor, nn.Parameter):  # returns before the import, which takes most of a second
        return parameter, (0,) * parameter.dim()
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    local, chunks = parameter.to_local(), parameter.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape):
        raise ValueError(
            "The local shard of each rank must be one contiguous block of the parameter, got placements "
            f"{parameter.placements}. Shard another dim, or initialize before sharding."
        )
    return local, tuple(chunks[0].offsets)
