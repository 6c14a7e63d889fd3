"""Find the module that mixes tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.probe import forwards

NamedModules = list[tuple[str, nn.Module]]
_CHANGES = (1.0, 1.0, 10.0, 10.0)
"""Standard deviations of new values of a token: a choice among tokens need not turn with each."""


def part_that_mixes(
    parts: NamedModules,
    calls: Mapping[nn.Module, forwards.Call],
    apart: Collection[nn.Module],
    opened: Collection[str],
    length: int,
) -> str:
    """Say which of `parts`, or of what is in them, mixes tokens: the outermost, below a whole layer; "" for none.

    `calls` are what they were called with, on `length` tokens; those `apart` may mix; those `opened` are looked into.
    """
    waiting = list(parts)
    while waiting:
        name, module = waiting.pop(0)
        if module in apart:
            continue
        children = [(f"{name}.{child}", inner) for child, inner in module.named_children()]
        mixes = None if name in opened or module not in calls else _mixes(module, calls[module], length)
        if mixes:
            is_layer = name.rpartition(".")[2].isdecimal()
            deeper = part_that_mixes(children, calls, apart, opened, length) if is_layer else ""
            return deeper or f"{name} ({type(module).__name__}) mixes tokens"
        if mixes is None:
            waiting = children + waiting
    return ""


def _mixes(module: nn.Module, call: forwards.Call, length: int) -> bool | None:
    """Return whether another value of a token changes what a module makes of others; None if it takes no stream."""
    stream = next((x for x in (*call.args, *call.kwargs.values()) if _has_tokens(x, length)), None)
    if stream is None:
        return None

    def output(given: Tensor) -> Tensor | None:
        args = (given if argument is stream else argument for argument in call.args)
        kwargs = {name: given if argument is stream else argument for name, argument in call.kwargs.items()}
        return forwards.first_tensor(module(*args, **kwargs))

    dim = next(d for d in (-2, *range(stream.dim())) if stream.size(d) == length)
    others = torch.arange(length) != length // 3
    try:
        before = output(stream)
        for size in _CHANGES:
            changed = stream.clone()
            changed.select(dim, length // 3).normal_(std=size)
            after = output(changed)
            if before is None or after is None:
                return None
            dims = [d for d in (-2, *range(before.dim())) if before.dim() >= 2 and before.size(d) == length]
            if not dims or not alike(before.movedim(dims[0], 0)[others], after.movedim(dims[0], 0)[others]):
                return True
    except Exception:  # third-party code that does not run twice: another module may tell
        return None
    return False


def _has_tokens(argument: Any, length: int) -> bool:
    is_stream = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() >= 2
    return is_stream and length in argument.shape


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same up to the rounding of many operations in their dtype.

    That is 1.1e-11 of the norm in float64, in which a probe runs where it can, and 1.4e-5 in float32.
    """
    tolerance = torch.finfo(other.dtype).eps ** 0.7
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())
