"""Checks of the names, shapes, dtypes and tied values of checkpoint tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from titan_models.hugging_face.rules import listed
from titan_models.initialization.local_shard import local_shard

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_shapes(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ValueError, with the keys, unless `found` has exactly the names and shapes of `shapes`."""
    missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(
            f"{what} must have exactly the {len(shapes)} tensors of this model, got missing: {listed(missing)}; "
            f"unexpected: {listed(unexpected)}. Use the flavor that the weights belong to."
        )
    wrong = [name for name, shape in shapes.items() if found[name] != shape]
    if wrong:
        differences = [f"{name} {list(found[name])} instead of {list(shapes[name])}" for name in wrong]
        raise ValueError(
            f"{what} must have the shapes of this model, got {listed(differences)}. Use the flavor that the weights "
            "belong to."
        )


def check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ValueError, with the keys, unless all tensors have one floating-point dtype."""
    for common, _ in Counter(dtypes.values()).most_common(1):
        other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype != common]
        if other:
            raise ValueError(f"All weights must have one dtype, got {listed(other)} besides {common}. Cast them first.")
        if not common.is_floating_point:
            raise ValueError(f"Weights must have a floating-point dtype, got {common}. Dequantize them first.")


def check_floats(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ValueError, with the keys, unless each dtype is a floating-point dtype without scales."""
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if other:
        raise ValueError(
            f"Weights of a checkpoint must have dtype {', '.join(map(str, _FLOATS))}, or be quantized and stored with "
            f"their scales, got {listed(other)}."
        )


def check_same(names: Sequence[str], repeat: Tensor, original: Tensor) -> Tensor:
    """Return `original` after comparing `repeat` with it. Raises ValueError if the local values differ.

    Tensors on the meta device have no values and are not compared.
    """
    if not _equal(repeat, original):
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same values, since this model ties them, got different values. "
            "Use a flavor that does not tie them."
        )
    return original


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    if first.is_meta or second.is_meta:
        return True
    first, second = local_shard(first)[0], local_shard(second)[0]
    wider = torch.promote_types(first.dtype, second.dtype)
    return first is second or torch.equal(first.to(wider), second.to(wider))
