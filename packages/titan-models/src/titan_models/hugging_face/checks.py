"""Whether tensors are those of a model: their names, shapes, dtypes, and values that must be the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from titan_models.hugging_face.rules import listed
from titan_models.initialization.local_shard import local_part

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_shapes(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], whose: str) -> None:
    """Raise ValueError, naming keys, unless there are exactly these names and shapes."""
    missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(
            f"Got a state that lacks {listed(missing)} and has {listed(unexpected)} besides. {whose} has "
            f"{len(shapes)} tensors, all needed, and no others. Take the flavor that the weights belong to."
        )
    wrong = [name for name, shape in shapes.items() if found[name] != shape]
    if wrong:
        told = [f"{name} {list(found[name])} instead of {list(shapes[name])}" for name in wrong]
        raise ValueError(f"Got {listed(told)}. Shapes must agree. Take the flavor that the weights belong to.")


def check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ValueError, naming keys, unless all have one floating dtype."""
    for common, _ in Counter(dtypes.values()).most_common(1):
        other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype != common]
        if other:
            raise ValueError(f"Got {listed(other)} among {common}. Weights have one dtype. Cast them to one before.")
        if not common.is_floating_point:
            raise ValueError(f"Got weights of {common}. They are floating-point numbers. Dequantize them before.")


def check_floats(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ValueError, naming keys, unless each holds floating-point numbers that need no factors."""
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if other:
        raise ValueError(
            f"Weights of a checkpoint must be of {', '.join(map(str, _FLOATS))}, or quantized with factors beside "
            f"them, got {listed(other)}."
        )


def check_same(names: Sequence[str], repeat: Tensor, original: Tensor) -> Tensor:
    """The values that both have. Raises ValueError where they differ, as far as this rank has them.

    On the meta device there are no values to compare.
    """
    if not _equal(repeat, original):
        raise ValueError(
            f"Got {names[0]} with other values than {names[1]}. This model has one weight for both. Take the flavor "
            "that does not tie them."
        )
    return original


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    if first.is_meta or second.is_meta:
        return True
    first, second = local_part(first)[0], local_part(second)[0]
    wider = torch.promote_types(first.dtype, second.dtype)
    return first is second or torch.equal(first.to(wider), second.to(wider))
