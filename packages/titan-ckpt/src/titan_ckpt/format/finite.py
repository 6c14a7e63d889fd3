"""Detection of NaN and infinite values in weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def find_nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with NaN or infinite values; reads each tensor once, without a copy.

    For a `DTensor` the answer covers all ranks and needs a collective; pass local tensors to check this rank alone.
    """
    extremes = {name: _extremes(tensor.detach()) for name, tensor in tensors.items() if tensor.numel()}
    return [name for name, pair in extremes.items() if not all(math.isfinite(float(value)) for value in pair)]


def _extremes(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the minimum and the maximum, which are NaN if any value is NaN."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return ()
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # torch cannot compare float8; bfloat16 holds all of its values
    return torch.aminmax(tensor)
