"""A model's forward with parts of it replaced for a moment, watched, or cut short.

T tokens, D width, H heads, G key-value heads, V features of a value.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titan_parallel._torch.distributed import KeepsNoSubclass
from titan_parallel.pipeline_parallel.stand_ins import StreamArgument
from titan_parallel.probe.float64 import computing_in

_NAME = "titan_parallel_probe"
"""Of the attention in the interfaces of transformers."""


class Stopped(Exception):
    """The forward came to where it was to stop."""


@dataclass(frozen=True)
class Call:
    """What a module was called with, the first time."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def leaving_no_trace(dtype: torch.dtype) -> Iterator[None]:
    """Run without gradients on the CPU in `dtype`; restore random state."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), computing_in(dtype):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


class Draws:
    """Notes whether random numbers were drawn while it was entered, once or more often."""

    def __init__(self) -> None:
        self.any = False

    def __enter__(self) -> None:
        self._before = _random_state()

    def __exit__(self, *_: object) -> None:
        self.any = self.any or self._before != _random_state()


def _random_state() -> tuple[Any, ...]:
    """The state of the generators of torch (on the CPU), of Python and of numpy, where somebody imported it."""
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    of_numpy = None if state is None else (state[1].tolist(), state[2])
    return torch.get_rng_state().tolist(), random.getstate(), of_numpy


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of these modules."""
    own: dict[nn.Module, Callable[..., Any] | None] = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[nn.Module, Call]]:
    """Note the first call of each module of `model`, in order."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, Call(args, kwargs))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class RegionOutput(KeepsNoSubclass):
    """What the stand-in of a region returns: the stream, which may be taken as the first of `num_outputs`."""

    num_outputs = 1

    def __getitem__(self, index: Any) -> Any:
        return (self.plain() if index == 0 else None) if isinstance(index, int) else self.plain()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter([self.plain(), *[None] * (self.num_outputs - 1)])


def region_of_tokens(region: nn.Module, num_outputs: int) -> Callable[..., Any]:
    """A forward in place of a region's: a function of the stream on each token."""
    stream_argument = StreamArgument(region)

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream: Tensor = stream_argument.of(args, kwargs)
        output = (stream * 0.7).sin().as_subclass(RegionOutput)
        output.num_outputs = num_outputs
        return output

    return forward


def attention_of_tokens(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """An attention core in which each token sees itself alone: `[B, T, H, K]`, `[B, T, G, K]` to `[B, T, H, V]`."""
    k, v = (x.repeat_interleave(q.size(-2) // x.size(-2), -2) for x in (k, v))
    return v + (q.mean(-1, keepdim=True) + 0.5 * k.mean(-1, keepdim=True)).sin()


def let_transformers_attend_by_token(model: Any) -> None:
    """Put that core into a model of transformers, which is a copy. Its masks are None."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        return attention_of_tokens(*(x.transpose(1, 2) for x in (q, k, v))), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, lambda **_: None)
    model.set_attn_implementation(_NAME)


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor in what a module returns."""
    return next((x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None)


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a model returns, or else its first tensor."""
    if isinstance(output, Mapping) and "logits" in output:
        return first_tensor(output["logits"])
    return first_tensor(getattr(output, "logits", output))
