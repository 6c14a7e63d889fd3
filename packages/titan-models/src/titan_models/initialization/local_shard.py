"""The part of a parameter that this rank holds. The one file that touches torch's private side of `DTensor`."""

from __future__ import annotations

from torch import Tensor, nn


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor this rank holds of `parameter`, and where it begins in each dim. A plain tensor is held whole."""
    if type(parameter) in (Tensor, nn.Parameter):  # also spares the import, most of a second
        return parameter, (0,) * parameter.dim()
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    local, chunks = parameter.to_local(), parameter.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape):
        raise ValueError(
            f"Got a parameter of placements {parameter.placements}. Initial weights need each rank's part to be one "
            "block of it. Shard interleaved parts on another dim, or initialize before sharding."
        )
    return local, tuple(chunks[0].offsets)
