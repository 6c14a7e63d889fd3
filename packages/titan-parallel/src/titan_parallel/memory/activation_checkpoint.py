"""Recomputation: which activations of a block are thrown away after the forward and made again in the backward."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from titan_config import ConfigError, Configurable
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Forward = Callable[..., Any]


class ActivationCheckpoint(Configurable, ABC):
    """Memory for time, block by block. A way of your own is a subclass with a `wrap`."""

    period: int | None = None
    """After how many blocks the choice repeats itself, for plans. None: not known."""

    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config) -> None:
        pass

    @abstractmethod
    def wrap(self, forward: Forward, index: int) -> Forward:
        """The forward of block number `index` (from 0) with recomputation, or as it is."""


class FullActivationCheckpoint(ActivationCheckpoint):
    """Keeps the inputs of blocks and makes all else again: least memory, a third more compute."""

    period = 1

    def wrap(self, forward: Forward, index: int) -> Forward:
        return _checkpointed(forward, {})


class SelectiveActivationCheckpoint(ActivationCheckpoint):
    """Keeps what is dear to make (matrix products, attention, sums over ranks) and makes the rest again."""

    period = 1

    def wrap(self, forward: Forward, index: int) -> Forward:
        contexts = functools.partial(create_selective_checkpoint_contexts, _save_expensive_outputs)
        return _checkpointed(forward, {"context_fn": contexts})


class PeriodicActivationCheckpoint(ActivationCheckpoint):
    """Recomputes every n-th block in full (the first, the n+1st, ...) and keeps the activations of the others."""

    class Config(ActivationCheckpoint.Config):
        n: int = 2

        def validate(self) -> None:
            if self.n < 1:
                raise ConfigError(f"Got n {self.n}. One block of n is recomputed. Set n to 1 (every block) or more.")

    def __init__(self, config: Config) -> None:
        self._n = self.period = config.n

    def wrap(self, forward: Forward, index: int) -> Forward:
        return _checkpointed(forward, {}) if index % self._n == 0 else forward


def _checkpointed(forward: Forward, options: dict[str, Any]) -> Forward:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False, **options)

    return recomputed


_DEAR = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "_c10d_functional": ("all_reduce", "reduce_scatter_tensor"),
}


@functools.cache
def _expensive_operators() -> frozenset[Any]:
    named = {getattr(getattr(torch.ops, space), name).default for space, names in _DEAR.items() for name in names}
    return frozenset({*named, torch.ops.higher_order.flex_attention})


_is_made_again = False


@contextmanager
def recomputed_operators() -> Iterator[None]:
    """Nothing made herein is dear: for what keeps less than its matrix products, such as a ring."""
    global _is_made_again
    before, _is_made_again = _is_made_again, True
    try:
        yield
    finally:
        _is_made_again = before


def _save_expensive_outputs(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if _is_made_again:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if operator in _expensive_operators() else CheckpointPolicy.PREFER_RECOMPUTE
