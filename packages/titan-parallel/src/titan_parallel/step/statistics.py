"""What modules of a model count over a step: summed over all ranks, and given back to them after the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.roles import Roles


class CountsPerStep(Protocol):
    """What a module with the role `step_counter` offers."""

    @property
    def leaf(self) -> Tensor | None:
        """A tensor, `[n]`, whose gradient is what this rank counted. None: the module is another rank's."""

    def update(self, counted: Tensor) -> None:
        """Act on what all ranks counted in a step, after the optimizer did; what it changes is alike on all ranks."""

    def metrics(self, counted: Tensor) -> Mapping[str, float]:
        """What is worth telling of it, by name; called on every rank, also where `leaf` is None."""


class StepStatistics:
    """The statistics of a whole model as one vector, which a rank fills where it holds them.

    Built before a pipeline's stages are cut, so that every rank knows of all. Ranks that compute on the same tokens
    (those of the tensor axis, in a region or without sequence parallel) count them once.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
        names = roles.named("step_counter")
        self._modules = [cast(CountsPerStep, model.get_submodule(name)) for name in names]
        self._sizes = [len(cast(Tensor, module.leaf)) for module in self._modules]
        is_first = dims.mesh.get_local_rank("tp") == 0
        self._counts = [is_first or (dims.sequence_parallel and roles.region_of(name) is None) for name in names]
        self._device_type = dims.device_type
        self.size = sum(self._sizes)
        """How many numbers all statistics are."""
        self.summed: Tensor | None = None
        """What all ranks counted, fp64: to be set once it is summed; None until then."""

    def forget(self) -> None:
        """Begin anew."""
        self.summed = None
        for module in self._modules:
            if module.leaf is not None:
                module.leaf.grad = None

    def own(self) -> Tensor:
        """What this rank counted, fp64; zeros for what others hold or count."""
        parts = [torch.zeros(size, dtype=torch.float64, device=self._device_type) for size in self._sizes]
        for part, module, counts in zip(parts, self._modules, self._counts, strict=True):
            if counts and module.leaf is not None and module.leaf.grad is not None:
                part.copy_(module.leaf.grad)
        return torch.cat(parts)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """Let the modules act on what was summed, and begin anew; what they tell, of each name the highest."""
        summed = cast(Tensor, self.summed)
        self.forget()
        measured: list[tuple[str, float]] = []
        for module, counted, told in zip(
            self._modules, summed.split(self._sizes), summed.cpu().split(self._sizes), strict=True
        ):
            if module.leaf is not None:
                module.update(counted)
            measured += module.metrics(told).items()
        return {name: max(value for other, value in measured if other == name) for name, _ in measured}
