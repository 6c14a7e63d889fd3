"""Simulate one step of one rank on fake tensors, with the code that a real step runs, and record it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titan_parallel._torch.tracing import (
    fake_tensors,
    flex_attention_on_fake_tensors,
    join_fake_ranks,
    stages_of_given_shapes,
)
from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.parallelize import parallelize
from titan_parallel.planning.bubble import bubble_of, max_in_flight
from titan_parallel.planning.child import run_in_child
from titan_parallel.planning.record import PipelineRank, StepRecord
from titan_parallel.planning.recorder import Recorder
from titan_parallel.sharding_plan.roles import Roles, RoleTable, inside
from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.grad_norm import local
from titan_parallel.step.gradient_accumulation import Schedule
from titan_parallel.transforms import Transform


class TorchOptimizer(Protocol):
    """The methods of an optimizer that a dry run calls; every `torch.optim.Optimizer` has them."""

    @property
    def state(self) -> Mapping[Any, Any]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], TorchOptimizer]


@dataclass(frozen=True)
class BatchSpec:
    """The shapes and dtypes of a micro-batch, as tensors on the meta device."""

    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    sequence_dims: Mapping[str, int]

    @classmethod
    def of(cls, batch: Batch, batch_size: int | None = None) -> BatchSpec:
        """Return the spec of `batch`, with `batch_size` sequences instead where it is given."""
        inputs, targets = (
            {name: _on_meta(t, batch_size) for name, t in tensors.items()} for tensors in (batch.inputs, batch.targets)
        )
        return cls(inputs, targets, dict(batch.sequence_dims))

    def new(self) -> BatchSpec:
        """Return a micro-batch of these shapes on the CPU."""
        inputs, targets = (
            {name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}
            for tensors in (self.inputs, self.targets)
        )
        return BatchSpec(inputs, targets, self.sequence_dims)

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.targets.values())))

    @property
    def num_tokens(self) -> int:
        """Batch size times sequence length; the batch size alone where targets have no sequence dim."""
        name, target = next(iter(self.targets.items()))
        return len(target) * (target.size(self.sequence_dims[name]) if name in self.sequence_dims else 1)


@dataclass(frozen=True)
class SimulatedStep:
    """The settings of a step, from the arguments of `plan`."""

    build: Callable[[], nn.Module]
    roles: RoleTable | None
    parallelism: ParallelDims.Config
    world_size: int
    batch: BatchSpec
    num_batches: int
    loss: Loss
    build_optimizer: BuildOptimizer
    activation_checkpoint: ActivationCheckpoint.Config | None = None
    mixed_precision: MixedPrecision.Config | None = None
    output: Callable[[Any], Tensor] | None = None
    extra_transforms: Sequence[Transform] = ()
    also: Callable[[ParallelDims], None] | None = None
    num_scheduled_batches: int | None = None
    """Number of micro-batches of the schedule for which the bubble is computed. None: `num_batches`."""
    removed_blocks: tuple[str, ...] = ()
    """Names of blocks, all of one list, that are removed; later blocks of the list are renumbered."""

    def changed(self, **changes: Any) -> SimulatedStep:
        """Return this step with other settings."""
        return replace(self, **changes)

    def with_degrees(self, **degrees: int) -> SimulatedStep:
        """Return this step on another mesh, with weights sharded over all remaining ranks."""
        config = copy.deepcopy(self.parallelism)
        for name, degree in {**degrees, "data_parallel_shard_degree": None}.items():
            setattr(config, name, degree)
        return replace(self, parallelism=config)

    def built(self) -> tuple[nn.Module, RoleTable]:
        """Return the model on the meta device, and its roles."""
        with torch.device("meta"):
            model = self.build()
        roles = self.roles if self.roles is not None else model.roles()  # type: ignore[operator]
        for name in reversed(self.removed_blocks):
            parent, _, number = name.rpartition(".")
            del model.get_submodule(parent)[int(number)]  # type: ignore[operator]
        kept = {p: role for p, role in roles.items() if not any(inside(p, name) for name in self.removed_blocks)}
        return model, {self._renumbered(pattern): role for pattern, role in kept.items()}

    def _renumbered(self, pattern: str) -> str:
        """Return a pattern as it is without the removed blocks: `layers.9.norm` may become `layers.5.norm`."""
        for parent in {name.rpartition(".")[0] for name in self.removed_blocks}:
            number, dot, rest = pattern.removeprefix(f"{parent}.").partition(".")
            if pattern.startswith(f"{parent}.") and number.isdecimal():
                before = sum(
                    inside(name, parent) and int(name.rpartition(".")[2]) < int(number) for name in self.removed_blocks
                )
                return f"{parent}.{int(number) - before}{dot}{rest}"
        return pattern


def simulate(step: SimulatedStep, rank: int) -> StepRecord:
    """Return memory, FLOPs and communication of `rank` in `step`, once the optimizer has its state."""
    return run_in_child(lambda: _simulated(step, rank))


def _simulated(step: SimulatedStep, rank: int) -> StepRecord:
    join_fake_ranks(rank, step.world_size)
    dims = step.parallelism.build(world_size=step.world_size, device_type="cpu")
    model, roles = step.built()
    vocab_size = _vocab_size(model, Roles(model, roles))
    parallel = parallelize(
        model,
        roles,
        dims,
        activation_checkpoint=step.activation_checkpoint,
        mixed_precision=step.mixed_precision,
        output=step.output,
        extra_transforms=step.extra_transforms,
    )
    with fake_tensors(), flex_attention_on_fake_tensors(), stages_of_given_shapes():
        parallel.to_empty("cpu")
        optimizer = step.build_optimizer(model.named_parameters())
        _create_state(optimizer, model)
        recorder = Recorder(dims, -(-vocab_size // dims.tp_size) if vocab_size else None)
        return _recorded(step, parallel, optimizer, recorder)


def _recorded(
    step: SimulatedStep, parallel: ParallelModel, optimizer: TorchOptimizer, recorder: Recorder
) -> StepRecord:
    timeline, parameters = recorder.timeline, [local(p).detach() for p in parallel.model.parameters()]
    timeline.label([*parameters, *parallel.model.buffers()], "parameters")
    state = _state_tensors(optimizer)
    timeline.label(state, "optimizer")
    batches = [step.batch.new() for _ in range(step.num_batches)]
    timeline.label([t for batch in batches for t in (*batch.inputs.values(), *batch.targets.values())], "working")
    parallel.probe_shapes(batches)  # a run does so in its first step only
    with recorder:
        if step.also is not None:
            step.also(parallel.dims)
        parallel.forward_backward(batches, step.loss, denominator=1.0)
        timeline.phase = "optimizer"
        with torch.no_grad():
            gradients = [local(p.grad) for p in parallel.model.parameters() if p.grad is not None]
        timeline.label(gradients, "gradients")
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
    peaks = timeline.peaks()
    bubble, pipeline = _pipeline(parallel.schedule, step.num_scheduled_batches or step.num_batches)
    return StepRecord(
        sizes={
            "parameters": _num_bytes(parameters),
            "gradients": _num_bytes(gradients),
            "optimizer": _num_bytes(state),
            "activations": timeline.peak_of("activations"),
        },
        flops={"full": recorder.flops.full, "causal": recorder.flops.causal},
        calls=dict(recorder.traffic.calls),
        traffic=dict(recorder.traffic.bytes),
        peaks={(site, name): size for site, sizes in peaks.items() for name, size in sizes.items()},
        bubble=bubble,
        pipeline=pipeline,
    )


def _pipeline(schedule: Schedule, num_batches: int) -> tuple[float | None, list[PipelineRank]]:
    """Return the bubble, and all ranks of the pipeline; (None, []) without one."""
    from titan_parallel.pipeline_parallel.schedule import Pipeline

    if not isinstance(schedule, Pipeline):
        return None, []
    orders = schedule.orders(num_batches)
    ranks = zip(schedule.blocks_of_ranks(), max_in_flight(orders), strict=True)
    return bubble_of(orders, schedule.num_stages), [PipelineRank(blocks, in_flight) for blocks, in_flight in ranks]


def _create_state(optimizer: TorchOptimizer, model: nn.Module) -> None:
    """Run a first step, in which many optimizers create their state."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _state_tensors(optimizer: TorchOptimizer) -> list[Tensor]:
    with torch.no_grad():
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [local(value) for value in states if isinstance(value, Tensor)]


def _vocab_size(model: nn.Module, roles: Roles) -> int | None:
    if roles.head is None:
        return None
    weight = next(model.get_submodule(roles.head).parameters(), None)
    return None if weight is None else len(weight)


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _on_meta(tensor: Tensor, batch_size: int | None) -> Tensor:
    shape = tensor.shape if batch_size is None else (batch_size, *tensor.shape[1:])
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
