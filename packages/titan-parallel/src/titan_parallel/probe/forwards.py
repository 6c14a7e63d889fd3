"""Forward passes of a probe: replace the forward of some modules, record calls, or stop early.

T tokens, D width, H heads, G key-value heads, K head dim, V features of a value.
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

_ATTENTION_NAME = "titan_parallel_probe"
"""The name of the token-wise attention in the attention registry of transformers."""


class StopForward(Exception):
    """Ends a forward early, once its last block has run."""


@dataclass(frozen=True)
class Call:
    """The arguments of the first call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def isolated(dtype: torch.dtype) -> Iterator[None]:
    """Run without gradients on the CPU in `dtype`; restore the random state of torch, Python and numpy at exit."""
    python_state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), computing_in(dtype):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class RandomDraws:
    """A context manager, reusable, that records in `seen` whether random numbers were drawn within it."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> None:
        self._before = _random_state()

    def __exit__(self, *_: object) -> None:
        self.seen = self.seen or self._before != _random_state()


def _random_state() -> tuple[Any, ...]:
    """Return the state of the generators of torch (on the CPU), of Python, and of numpy if it is imported."""
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    numpy_state = None if state is None else (state[1].tolist(), state[2])
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of these modules, and restore them at exit."""
    originals: dict[nn.Module, Callable[..., Any] | None] = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in originals.items():
            del module.forward
            if original is not None:
                module.forward = original


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[dict[nn.Module, Call]]:
    """Record the first call of each module of `model`, in order of the calls."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, Call(args, kwargs))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class RegionOutput(KeepsNoSubclass):
    """The output of a region's stand-in: hidden states that can also be read as the first of `num_outputs` outputs."""

    num_outputs = 1

    def __getitem__(self, index: Any) -> Any:
        return (self.plain() if index == 0 else None) if isinstance(index, int) else self.plain()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter([self.plain(), *[None] * (self.num_outputs - 1)])


def tokenwise_region(region: nn.Module, num_outputs: int) -> Callable[..., Any]:
    """Return a stand-in for a region's forward: an elementwise function of the hidden states."""
    hidden_argument = StreamArgument(region)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = hidden_argument.of(args, kwargs)
        output = (hidden * 0.7).sin().as_subclass(RegionOutput)
        output.num_outputs = num_outputs
        return output

    return forward


def tokenwise_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return a function of q, k and v in which each token attends to itself alone.

    Stands in for an attention core: `[B, T, H, K]` and `[B, T, G, K]` to `[B, T, H, V]`.
    """
    k, v = (x.repeat_interleave(q.size(-2) // x.size(-2), -2) for x in (k, v))
    return v + (q.mean(-1, keepdim=True) + 0.5 * k.mean(-1, keepdim=True)).sin()


def use_tokenwise_attention(model: Any) -> None:
    """Set the attention of a (copied) model of transformers to `tokenwise_attention`. Its masks are None."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        return tokenwise_attention(*(x.transpose(1, 2) for x in (q, k, v))), None

    AttentionInterface.register(_ATTENTION_NAME, attend)
    AttentionMaskInterface.register(_ATTENTION_NAME, lambda **_: None)
    model.set_attn_implementation(_ATTENTION_NAME)


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor in the output of a module."""
    return next((x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None)


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in the output of a model, or else its first tensor."""
    if isinstance(output, Mapping) and "logits" in output:
        return first_tensor(output["logits"])
    return first_tensor(getattr(output, "logits", output))
