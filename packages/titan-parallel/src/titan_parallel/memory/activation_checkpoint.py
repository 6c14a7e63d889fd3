"""Activation checkpointing (recomputation): the activations of a block that are freed after the forward.

The backward computes freed activations again: less memory for more compute.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from titan_config import ConfigError, Configurable
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_parallel.sharding_plan.roles import RoleSpec
from titan_parallel.sharding_plan.units import check_has_units, units_of
from titan_parallel.transforms import ParallelBuild

Forward = Callable[..., Any]


class ActivationCheckpoint(Configurable, ABC):
    """Activation checkpointing of each block or unit of a model. A custom policy is a subclass with a `wrap`."""

    period: int | None = None
    """Number of blocks after which the policy repeats itself; a dry run simulates only so many. None: unknown."""

    roles: Mapping[str, RoleSpec] = {
        "block": RoleSpec(options={"streams"}),
        "unit": RoleSpec(options={"streams"}),
    }

    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config) -> None:
        pass

    @abstractmethod
    def wrap(self, forward: Forward, index: int) -> Forward:
        """Return the forward of block number `index` (from 0) with recomputation, or `forward` itself."""

    def validate(self, build: ParallelBuild) -> None:
        """Raise ConfigError for a model without blocks or units."""
        check_has_units(build.roles, "activation_checkpoint")

    def apply(self, build: ParallelBuild) -> None:
        """Replace the forward of each block and unit."""
        for index, unit in enumerate(units_of(build.model, build.roles).values()):
            unit.forward = self.wrap(unit.forward, index)


class FullActivationCheckpoint(ActivationCheckpoint):
    """Save the inputs of blocks alone: least memory, about a third more compute."""

    period = 1

    def wrap(self, forward: Forward, index: int) -> Forward:
        return _checkpointed(forward, {})


class SelectiveActivationCheckpoint(ActivationCheckpoint):
    """Save the outputs of matrix products, attention and collectives, and recompute cheap operators."""

    period = 1

    def wrap(self, forward: Forward, index: int) -> Forward:
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        return _checkpointed(forward, {"context_fn": contexts})


class PeriodicActivationCheckpoint(ActivationCheckpoint):
    """Recompute every n-th block in full (the first, the n+1st, ...), and save all activations of the others."""

    class Config(ActivationCheckpoint.Config):
        n: int = 2
        """One block of n is recomputed."""

        def validate(self) -> None:
            if self.n < 1:
                raise ConfigError(f"n must be at least 1 (every block), got {self.n}.")

    def __init__(self, config: Config) -> None:
        self._n = self.period = config.n

    def wrap(self, forward: Forward, index: int) -> Forward:
        return _checkpointed(forward, {}) if index % self._n == 0 else forward


def _checkpointed(forward: Forward, options: dict[str, Any]) -> Forward:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False, **options)

    return recomputed


_SAVED = {
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
def _saved_operators() -> frozenset[Any]:
    named = {getattr(getattr(torch.ops, space), name).default for space, names in _SAVED.items() for name in names}
    return frozenset({*named, torch.ops.higher_order.flex_attention})


_saves_nothing = False


@contextmanager
def save_nothing() -> Iterator[None]:
    """Let selective activation checkpointing save no operator within the context.

    For operators that save less themselves than their matrix products, such as ring attention.
    """
    global _saves_nothing
    before, _saves_nothing = _saves_nothing, True
    try:
        yield
    finally:
        _saves_nothing = before


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    saves = not _saves_nothing and operator in _saved_operators()
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE
