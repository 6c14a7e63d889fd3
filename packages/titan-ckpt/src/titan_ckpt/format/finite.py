"""Values that are not finite among weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinite values; each is read once, and nothing of its size is made.

    A `DTensor` gives the answer of all its ranks, in a collective; give local tensors to ask this rank alone.
    """
    extremes = {name: _extremes(tensor.detach()) for name, tensor in tensors.items() if tensor.numel()}
    return [name for name, pair in extremes.items() if not all(math.isfinite(float(value)) for value in pair)]


def _extremes(tensor: Tensor) -> tuple[Tensor, ...]:
    """The least and the greatest value, which are NaN where any is."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return ()
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # torch has no order for its types of 8 bits; float8_e8m0fnu fits
    return torch.aminmax(tensor)
