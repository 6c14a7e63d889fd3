"""The protocol of the transforms that `parallelize` applies to a model, and what they work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.roles import Roles, RoleSpec
from titan_parallel.step.forward_loss import LossForward
from titan_parallel.step.gradient_accumulation import GradientAccumulation, Schedule
from titan_parallel.step.hooks import StepHooks
from titan_parallel.step.loss_in_head import HeadForward

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Forward = Callable[..., Any]


class Transform(Protocol):
    """One mechanism: a kind of parallelism, activation checkpointing, compilation, or a third-party one.

    `parallelize` first calls `validate` of all transforms, in order, and then `apply` of all.
    """

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The roles that this transform reads, by name. A table of roles may use those of all transforms."""

    def validate(self, build: ParallelBuild) -> None:
        """Raise ConfigError where the model, its roles, or the mesh do not suit. Changes no module.

        Called on every rank with the whole model. An error on one rank is raised on all, so no rank may wait for
        another here. A setting that was left to decide (`sequence_parallel` None) is decided in `build.dims`.
        """

    def apply(self, build: ParallelBuild) -> None:
        """Change `build.model` in place, and register in `build` and `build.step` what training steps need.

        Called on every rank. Here too an error on one rank is raised on all, and no rank may wait for another.
        """


@dataclass
class ParallelBuild:
    """A model on its way onto a mesh: what transforms read, change, and register."""

    model: nn.Module
    dims: ParallelDims
    roles: Roles
    """The roles of the model. A pipeline removes those of modules on other ranks, but for blocks and attention."""

    output: Callable[[Any], Tensor] | None = None
    """Select the logits in the output of the model."""

    step: StepHooks = field(default_factory=StepHooks)

    consistency: dict[str, str] = field(default_factory=dict)
    """Texts that must be equal on every rank, by name: compared after `apply`."""

    parameter_views: dict[nn.Module, Callable[[Forward], Forward]] = field(default_factory=dict)
    """For units whose parameters are stored as DTensors and computed on as local tensors: the swap around a forward.

    Recomputation runs the swap again, inside; compilation needs it outside of what is compiled too.
    """

    head: HeadForward | None = None
    """The forward of the head that computes the loss. None: the loss gets the output of the model."""

    wrap_root: Callable[[LossForward], nn.Module] | None = None
    """Make the module that runs the model, such as one of pipeline stages. None: the model itself."""

    make_schedule: Callable[[], Schedule] | None = None
    """Make the order in which micro-batches run. None: one after the other (gradient accumulation)."""

    units: list[FSDPModule] = field(default_factory=list)
    """The modules that FSDP gathers and reduces at once."""

    @cached_property
    def loss_forward(self) -> LossForward:
        """The loss of one micro-batch. Read it only after all transforms that change the head or the inputs."""
        return LossForward(
            self.model,
            self.dims.device_type,
            head=self.head,
            output=self.output,
            sequence_sharding=self.step.sequence_sharding,
        )

    @cached_property
    def root(self) -> nn.Module:
        """The module that runs the model."""
        return self.model if self.wrap_root is None else self.wrap_root(self.loss_forward)

    def schedule(self) -> Schedule:
        """Return the order in which the micro-batches of a step run."""
        if self.make_schedule is not None:
            return self.make_schedule()
        dims = self.dims
        owns_shards = dims.dp_shard_size * dims.cp_size > 1
        reduces_each = dims.config.fsdp_reduce_gradients == "always" and owns_shards
        return GradientAccumulation(self.loss_forward, self.units, reduces_each=reduces_each)
