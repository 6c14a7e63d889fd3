"""Transforms of what a training step does around the model: loss in the head, auxiliary losses, statistics."""

from __future__ import annotations

from collections.abc import Mapping

from titan_parallel.sharding_plan.roles import RoleSpec
from titan_parallel.step.auxiliary_losses import AuxiliaryLosses
from titan_parallel.step.loss_in_head import HeadForward
from titan_parallel.step.statistics import StepStatistics
from titan_parallel.transforms import ParallelBuild


class StepCounting:
    """Per-step counters of modules (tokens per expert), summed over all ranks with the loss."""

    roles: Mapping[str, RoleSpec] = {"step_counter": RoleSpec()}

    def validate(self, build: ParallelBuild) -> None: ...

    def apply(self, build: ParallelBuild) -> None:
        statistics = StepStatistics(build.model, build.roles, build.dims)
        build.step.statistics = statistics if statistics.size else None


class AuxiliaryLossScaling:
    """Auxiliary losses of modules, divided by the same denominator as the loss of the head."""

    roles: Mapping[str, RoleSpec] = {"auxiliary_loss": RoleSpec()}

    def validate(self, build: ParallelBuild) -> None: ...

    def apply(self, build: ParallelBuild) -> None:
        dims = build.dims
        losses = AuxiliaryLosses(build.model, build.roles, tp_size=dims.tp_size, device_type=dims.device_type)
        build.step.backward_contexts.append(losses.divided_by)


class LossInHead:
    """The loss computed in one call of the head, whose weight is gathered once for all chunks of logits."""

    roles: Mapping[str, RoleSpec] = {"head": RoleSpec(options={"takes_loss"})}

    def validate(self, build: ParallelBuild) -> None: ...

    def apply(self, build: ParallelBuild) -> None:
        name = build.roles.head
        if name is None:
            return
        head = build.model.get_submodule(name)
        forward = build.head or HeadForward(head.forward)
        head.forward = forward
        build.head = forward if build.roles.options(name).get("takes_loss", True) else None
