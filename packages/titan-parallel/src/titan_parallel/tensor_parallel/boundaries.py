"""The borders of regions: where the stream enters the work that ranks share, and where it leaves.

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


def bordered(forward: Forward, enter: Border, leave: Border) -> Forward:
    """`forward` of a region: the stream is its first parameter, and its output or the first of them."""
    return left(entered(forward, enter), leave)


def entered(forward: Forward, enter: Border) -> Forward:
    """`forward`, whose first parameter goes through `enter`, given by place or by name."""
    stream = _first_parameter(forward)

    @functools.wraps(forward)
    def enter_forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(enter(args[0]), *args[1:], **kwargs)
        return forward(**{**kwargs, stream: enter(kwargs[stream])})

    return enter_forward


def left(forward: Forward, leave: Border) -> Forward:
    """`forward`, whose output, or the first of them, goes through `leave`."""

    @functools.wraps(forward)
    def forward_leave(*args: Any, **kwargs: Any) -> Any:
        return _with_first(forward(*args, **kwargs), leave)

    return forward_leave


def split_sequence(first: nn.Module, last: nn.Module, axis: Axis) -> None:
    """Give a rank its tokens of the stream from the `first` block to the `last`, and before and after them all tokens.

    Gradients are a rank's share on either side: before, those of its own tokens; after, those by its own part of the
    vocabulary. (Hooks, so that nothing is compiled or recomputed in these blocks that others do not have.)
    """
    stream = _first_parameter(first.forward)

    def split(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (axis.own_tokens(args[0]), *args[1:]), kwargs
        return args, {**kwargs, stream: axis.own_tokens(kwargs[stream])}

    def gather(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _with_first(output, axis.gather_sequence)

    first.register_forward_pre_hook(split, with_kwargs=True)
    last.register_forward_hook(gather)


def normed_over_all_heads(forward: Forward, axis: Axis, copies: int) -> Forward:
    """`forward` of a norm over F features of which each rank has f: they are gathered, and each keeps its own.

    Of `copies` neighboring ranks that have the same features those of the first count.
    """

    @functools.wraps(forward)
    def norm(x_BTf: Tensor) -> Tensor:
        width = x_BTf.size(-1)
        all_BTrf = axis.gather_features(x_BTf).unflatten(-1, (axis.size, width))
        y_BTF: Tensor = forward(all_BTrf[..., ::copies, :].flatten(-2))
        return y_BTF.narrow(-1, axis.rank // copies * width, width)

    return norm


def _with_first(output: Any, border: Border) -> Any:
    return (border(output[0]), *output[1:]) if isinstance(output, tuple) else border(output)


def _first_parameter(forward: Forward) -> str:
    return next(iter(inspect.signature(forward).parameters))
