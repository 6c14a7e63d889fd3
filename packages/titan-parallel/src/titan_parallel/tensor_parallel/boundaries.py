"""Wrappers of forwards that run a collective where the residual stream enters or leaves a region.

T tokens, t tokens of one rank, D width, F features of all ranks, f features of one rank.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from titan_parallel.mesh.collectives import Axis

Forward = Callable[..., Any]
Border = Callable[[Tensor], Tensor]


def wrap_region(forward: Forward, enter: Border, leave: Border, streams: int = 1) -> Forward:
    """Wrap `forward` of a region, whose first `streams` parameters and outputs are residual streams."""
    return wrap_output(wrap_input(forward, enter, streams), leave, streams)


def wrap_input(forward: Forward, enter: Border, streams: int = 1) -> Forward:
    """Wrap `forward` to apply `enter` to its first `streams` arguments, positional or by keyword."""
    names = _first_parameters(forward, streams)

    @functools.wraps(forward)
    def enter_forward(*args: Any, **kwargs: Any) -> Any:
        by_position = [enter(arg) if place < streams else arg for place, arg in enumerate(args)]
        by_keyword = {name: enter(kwargs[name]) for name in names[len(args) :] if name in kwargs}
        return forward(*by_position, **{**kwargs, **by_keyword})

    return enter_forward


def wrap_output(forward: Forward, leave: Border, streams: int = 1) -> Forward:
    """Wrap `forward` to apply `leave` to its output, or to the first `streams` elements of a tuple."""

    @functools.wraps(forward)
    def forward_leave(*args: Any, **kwargs: Any) -> Any:
        return _with_first(forward(*args, **kwargs), leave, streams)

    return forward_leave


def split_sequence(first: nn.Module, last: nn.Module, axis: Axis) -> None:
    """Shard the residual stream along the sequence from the `first` block to the `last`; outside them it is whole.

    Gradients outside the blocks are partial: before them, a rank has those of its own tokens; after them, those from
    its own part of the vocabulary. (Hooks keep the split outside the compiled and recomputed code of these blocks, so
    that it is the same as in all others.)
    """
    (stream,) = _first_parameters(first.forward, 1)

    def split(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (axis.own_tokens(args[0]), *args[1:]), kwargs
        return args, {**kwargs, stream: axis.own_tokens(kwargs[stream])}

    def gather(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _with_first(output, axis.gather_sequence)

    first.register_forward_pre_hook(split, with_kwargs=True)
    last.register_forward_hook(gather)


def wrap_norm_over_heads(forward: Forward, axis: Axis, copies: int) -> Forward:
    """Wrap `forward` of a norm over F features, of which each rank has f: gather, normalize, keep this rank's features.

    `copies` neighboring ranks have the same features; only those of the first enter the norm.
    """

    @functools.wraps(forward)
    def norm(x_BTf: Tensor) -> Tensor:
        width = x_BTf.size(-1)
        all_BTrf = axis.gather_features(x_BTf).unflatten(-1, (axis.size, width))
        y_BTF: Tensor = forward(all_BTrf[..., ::copies, :].flatten(-2))
        return y_BTF.narrow(-1, axis.rank // copies * width, width)

    return norm


def _with_first(output: Any, border: Border, streams: int = 1) -> Any:
    if isinstance(output, tuple):
        return (*map(border, output[:streams]), *output[streams:])
    return border(output)


def _first_parameters(forward: Forward, number: int) -> list[str]:
    return list(inspect.signature(forward).parameters)[:number]
