"""Per-step statistics of modules (tokens per expert), summed over all ranks with the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.roles import Roles


class CountsPerStep(Protocol):
    """A module with the role `step_counter`."""

    @property
    def leaf(self) -> Tensor | None:
        """A tensor `[n]` whose gradient holds the counts of this rank. None: another rank holds the module."""

    def update(self, counted: Tensor) -> None:
        """Act on the counts of all ranks, `[n]`, after the optimizer step. Called with the same counts on all ranks."""

    def metrics(self, counted: Tensor) -> Mapping[str, float]:
        """Return metrics of the counts, by name. Called on every rank, also where `leaf` is None."""


class StepStatistics:
    """The step counters of a whole model as one vector, of which a rank fills the part of the modules that it holds.

    Built before a pipeline is cut into stages, so that every rank knows all counters. Ranks that compute on the same
    tokens (those of the tensor axis, in a region or without sequence parallelism) count them once.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
        names = roles.named("step_counter")
        self._modules = [cast(CountsPerStep, model.get_submodule(name)) for name in names]
        self._sizes = [len(cast(Tensor, module.leaf)) for module in self._modules]
        is_first = dims.mesh.get_local_rank("tp") == 0
        self._counts = [is_first or (dims.sequence_parallel and roles.region_of(name) is None) for name in names]
        self._device_type = dims.device_type
        self.size = sum(self._sizes)
        """The length of the vector."""
        self.summed: Tensor | None = None
        """The counts of all ranks, fp64 `[size]`. None until they are summed."""

    def reset(self) -> None:
        """Drop the counts of a step."""
        self.summed = None
        for module in self._modules:
            if module.leaf is not None:
                module.leaf.grad = None

    def local_counts(self) -> Tensor:
        """Return the counts of this rank, fp64 `[size]`; zeros for modules that other ranks hold or count."""
        parts = [torch.zeros(size, dtype=torch.float64, device=self._device_type) for size in self._sizes]
        for part, module, counts in zip(parts, self._modules, self._counts, strict=True):
            if counts and module.leaf is not None and module.leaf.grad is not None:
                part.copy_(module.leaf.grad)
        return torch.cat(parts)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """Let the modules act on the summed counts, reset, and return their metrics: the maximum over modules."""
        summed = cast(Tensor, self.summed)
        self.reset()
        measured: list[tuple[str, float]] = []
        for module, counted, told in zip(
            self._modules, summed.split(self._sizes), summed.cpu().split(self._sizes), strict=True
        ):
            if module.leaf is not None:
                module.update(counted)
            measured += module.metrics(told).items()
        return {name: max(value for other, value in measured if other == name) for name, _ in measured}
