"""Find the module that mixes tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.probe import forwards

NamedModules = list[tuple[str, nn.Module]]
_PERTURBATIONS = (1.0, 1.0, 10.0, 10.0)
"""Standard deviations of the new values of a token: several, as a choice among tokens need not change with each."""


def find_mixing_module(
    modules: NamedModules,
    calls: Mapping[nn.Module, forwards.Call],
    excluded: Collection[nn.Module],
    opened: Collection[str],
    length: int,
) -> str:
    """Describe the outermost of `modules`, or of their descendants, that mixes tokens; return "" if none does.

    For a whole layer the search goes on to its children. `calls` are the recorded calls, on `length` tokens. Modules in
    `excluded` may mix tokens. Of modules named in `opened` only the children are tested.
    """
    waiting = list(modules)
    while waiting:
        name, module = waiting.pop(0)
        if module in excluded:
            continue
        children = [(f"{name}.{child}", inner) for child, inner in module.named_children()]
        mixes = None if name in opened or module not in calls else _mixes(module, calls[module], length)
        if mixes:
            is_layer = name.rpartition(".")[2].isdecimal()
            deeper = find_mixing_module(children, calls, excluded, opened, length) if is_layer else ""
            return deeper or f"{name} ({type(module).__name__}) mixes tokens"
        if mixes is None:
            waiting = children + waiting
    return ""


def _mixes(module: nn.Module, call: forwards.Call, length: int) -> bool | None:
    """Return whether a new value of one token changes a module's output at other tokens.

    None if the module takes no hidden states, or cannot be run again.
    """
    hidden = next((x for x in (*call.args, *call.kwargs.values()) if _has_tokens(x, length)), None)
    if hidden is None:
        return None

    def output(given: Tensor) -> Tensor | None:
        args = (given if argument is hidden else argument for argument in call.args)
        kwargs = {name: given if argument is hidden else argument for name, argument in call.kwargs.items()}
        return forwards.first_tensor(module(*args, **kwargs))

    dim = next(d for d in (-2, *range(hidden.dim())) if hidden.size(d) == length)
    others = torch.arange(length) != length // 3
    try:
        before = output(hidden)
        for deviation in _PERTURBATIONS:
            changed = hidden.clone()
            changed.select(dim, length // 3).normal_(std=deviation)
            after = output(changed)
            if before is None or after is None:
                return None
            dims = [d for d in (-2, *range(before.dim())) if before.dim() >= 2 and before.size(d) == length]
            if not dims or not nearly_equal(before.movedim(dims[0], 0)[others], after.movedim(dims[0], 0)[others]):
                return True
    except Exception:  # third-party code that cannot be run again: another module may tell
        return None
    return False


def _has_tokens(argument: Any, length: int) -> bool:
    is_hidden = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() >= 2
    return is_hidden and length in argument.shape


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of many operations in their dtype.

    The tolerance is 1.1e-11 of the norm in float64 (the dtype of a probe wherever the model runs in it), and 1.4e-5 in
    float32.
    """
    tolerance = torch.finfo(other.dtype).eps ** 0.7
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())
