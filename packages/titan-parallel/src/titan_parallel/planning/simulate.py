"""One step of one rank on tensors without memory: the code that a real step runs, watched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titan_parallel._torch.tracing import (
    fake_tensors,
    flex_attention_of_shapes,
    join_fake_ranks,
    pipelines_of_shapes,
)
from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.parallelize import parallelize
from titan_parallel.planning.bubble import bubble_of, most_under_way
from titan_parallel.planning.child import in_child
from titan_parallel.planning.record import PipelineRank, StepRecord
from titan_parallel.planning.recorder import Recorder
from titan_parallel.sharding_plan.roles import Roles, RoleTable, inside
from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.grad_norm import local
from titan_parallel.step.gradient_accumulation import Schedule


class TorchOptimizer(Protocol):
    """What planning calls of an optimizer; every `torch.optim.Optimizer` has it."""

    @property
    def state(self) -> Mapping[Any, Any]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], TorchOptimizer]


@dataclass(frozen=True)
class Rows:
    """A micro-batch of which only the shapes are known."""

    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    sequence_dims: Mapping[str, int]

    @classmethod
    def of(cls, batch: Batch, rows: int | None = None) -> Rows:
        """The shapes of `batch`, with another number of rows where it is given."""
        inputs, targets = (
            {name: _shape(t, rows) for name, t in part.items()} for part in (batch.inputs, batch.targets)
        )
        return cls(inputs, targets, dict(batch.sequence_dims))

    def new(self) -> Rows:
        """A micro-batch of these shapes on the CPU."""
        inputs, targets = (
            {name: torch.empty_like(t, device="cpu") for name, t in part.items()}
            for part in (self.inputs, self.targets)
        )
        return Rows(inputs, targets, self.sequence_dims)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.targets.values())))

    @property
    def num_tokens(self) -> int:
        """Rows times sequence length, or rows where targets have no sequence."""
        name, target = next(iter(self.targets.items()))
        return len(target) * (target.size(self.sequence_dims[name]) if name in self.sequence_dims else 1)


@dataclass(frozen=True)
class SimulatedStep:
    """All that decides what a step does on a rank: the arguments of `plan`."""

    build: Callable[[], nn.Module]
    roles: RoleTable | None
    parallelism: ParallelDims.Config
    world_size: int
    batch: Rows
    num_batches: int
    loss: Loss
    build_optimizer: BuildOptimizer
    activation_checkpoint: ActivationCheckpoint.Config | None = None
    mixed_precision: MixedPrecision.Config | None = None
    output: Callable[[Any], Tensor] | None = None
    also: Callable[[ParallelDims], None] | None = None
    order_of: int | None = None
    """Micro-batches whose order in a pipeline decides the bubble; None: `num_batches`."""
    without: tuple[str, ...] = ()
    """Blocks, some of a list, that are left out; those behind them move up."""

    def changed(self, **changes: Any) -> SimulatedStep:
        return replace(self, **changes)

    def with_degrees(self, **degrees: int) -> SimulatedStep:
        """This step on another mesh; weights are sharded over the ranks that are left."""
        config = copy.deepcopy(self.parallelism)
        for name, degree in {**degrees, "data_parallel_shard_degree": None}.items():
            setattr(config, name, degree)
        return replace(self, parallelism=config)

    def built(self) -> tuple[nn.Module, RoleTable]:
        """The model on meta, and what its parts are."""
        with torch.device("meta"):
            model = self.build()
        roles = self.roles if self.roles is not None else model.roles()  # type: ignore[operator]
        for name in reversed(self.without):
            parent, _, number = name.rpartition(".")
            del model.get_submodule(parent)[int(number)]  # type: ignore[operator]
        kept = {p: role for p, role in roles.items() if not any(inside(p, name) for name in self.without)}
        return model, {self._moved_up(pattern): role for pattern, role in kept.items()}

    def _moved_up(self, pattern: str) -> str:
        """A pattern as it is where the blocks `without` are left out: `layers.9.norm` may become `layers.5.norm`."""
        for parent in {name.rpartition(".")[0] for name in self.without}:
            number, dot, rest = pattern.removeprefix(f"{parent}.").partition(".")
            if pattern.startswith(f"{parent}.") and number.isdecimal():
                before = sum(
                    inside(name, parent) and int(name.rpartition(".")[2]) < int(number) for name in self.without
                )
                return f"{parent}.{int(number) - before}{dot}{rest}"
        return pattern


def simulate(step: SimulatedStep, rank: int) -> StepRecord:
    """What `rank` holds, computes and sends in `step`, once the optimizer has its state."""
    return in_child(lambda: _simulated(step, rank))


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
    )
    with fake_tensors(), flex_attention_of_shapes(), pipelines_of_shapes():
        parallel.to_empty("cpu")
        optimizer = step.build_optimizer(model.named_parameters())
        _fill_state(optimizer, model)
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
    parallel._probe_shapes(batches)  # which a run does in its first step alone
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
    bubble, pipeline = _pipeline(parallel.schedule, step.order_of or step.num_batches)
    return StepRecord(
        sizes={
            "parameters": _num_bytes(parameters),
            "gradients": _num_bytes(gradients),
            "optimizer": _num_bytes(state),
            "activations": timeline.most("activations"),
        },
        flops={"full": recorder.flops.full, "causal": recorder.flops.causal},
        calls=dict(recorder.traffic.calls),
        traffic=dict(recorder.traffic.bytes),
        peaks={(place, name): size for place, sizes in peaks.items() for name, size in sizes.items()},
        bubble=bubble,
        pipeline=pipeline,
    )


def _pipeline(schedule: Schedule, num_batches: int) -> tuple[float | None, list[PipelineRank]]:
    """The bubble, and all ranks of the pipeline; nothing where there is none."""
    from titan_parallel.pipeline_parallel.schedule import Pipeline

    if not isinstance(schedule, Pipeline):
        return None, []
    orders = schedule.orders(num_batches)
    ranks = zip(schedule.blocks_of_ranks(), most_under_way(orders), strict=True)
    return bubble_of(orders, schedule.num_stages), [PipelineRank(blocks, under_way) for blocks, under_way in ranks]


def _fill_state(optimizer: TorchOptimizer, model: nn.Module) -> None:
    """Let an optimizer make its state: some do in their first step."""
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


def _shape(tensor: Tensor, rows: int | None) -> Tensor:
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
