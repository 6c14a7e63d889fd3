"""`plan`: know a run before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel._torch.tracing import join_fake_ranks
from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.mesh.parallel_dims import AXES, ParallelDims
from titan_parallel.planning.advice import remedies_of, wasteful
from titan_parallel.planning.alike import Alike
from titan_parallel.planning.child import in_child
from titan_parallel.planning.record import StepRecord
from titan_parallel.planning.report import Axis, Collective, Flops, Plan, Stage
from titan_parallel.planning.simulate import BuildOptimizer, Rows, SimulatedStep
from titan_parallel.planning.sizes import parse_bytes
from titan_parallel.sharding_plan.roles import RoleTable
from titan_parallel.step.batch import Batch, Loss


def plan(
    build: Callable[[], nn.Module],
    *,
    batch: Batch,
    loss: Loss,
    optimizer: BuildOptimizer,
    world_size: int,
    parallelism: ParallelDims.Config | None = None,
    num_batches: int = 1,
    roles: RoleTable | None = None,
    activation_checkpoint: ActivationCheckpoint.Config | None = None,
    compile: Compile.Config | None = None,
    mixed_precision: MixedPrecision.Config | None = None,
    output: Callable[[Any], Tensor] | None = None,
    also: Callable[[ParallelDims], None] | None = None,
    flops_per_token: tuple[int, int] | None = None,
    device_memory: int | str | None = None,
    ranks_per_node: int = 8,
    rank: int | None = None,
    every_block: bool = False,
) -> Plan:
    """What a run would hold, compute and send, found by a step of `parallelize`'s own code without memory or ranks.

    `build()` makes the model (on the meta device); `roles` None asks it: `model.roles()`. Of `batch`, one micro-batch
    of a data rank, only shapes are read; a step has `num_batches` of them. `optimizer(named_parameters)` is a
    `torch.optim.Optimizer` or has its `state`, `step` and `zero_grad`. `also(dims)` does what else a loop sends in a
    step. `flops_per_token` is (full, causal) where the model knows better than its operators tell. With
    `device_memory` (bytes, or "80GiB") the plan says whether it fits, and what would. `rank` is the one to look at;
    None takes the first of each stage, which has the largest parts of what does not divide. Blocks that are alike are
    simulated once or twice and counted as often as they are there, unless `every_block`. Compiled blocks are planned as
    eager ones, which keep and compute no less. All is done in forked children: this process may be a rank of
    something else. Raises ConfigError for what `parallelize` refuses.
    """
    step = SimulatedStep(
        build=build,
        roles=roles,
        parallelism=parallelism or ParallelDims.Config(),
        world_size=world_size,
        batch=Rows.of(batch),
        num_batches=num_batches,
        loss=loss,
        build_optimizer=optimizer,
        activation_checkpoint=activation_checkpoint,
        mixed_precision=mixed_precision,
        output=output,
        also=also,
    )
    limit = parse_bytes(device_memory) if isinstance(device_memory, str) else device_memory

    made = _planned(step, Alike(step, every_block), rank, flops_per_token, limit, ranks_per_node)
    return replace(made, compiled=compile is not None)


def _planned(
    step: SimulatedStep,
    alike: Alike,
    rank: int | None,
    flops_per_token: tuple[int, int] | None,
    limit: int | None,
    ranks_per_node: int,
) -> Plan:
    axes, dp_size, firsts = _mesh(step, ranks_per_node)
    ranks = firsts if rank is None else [rank]
    records = alike.records(step, ranks)
    tokens = step.batch.num_tokens * step.num_batches * dp_size
    made = Plan(
        model=alike.name,
        num_parameters=alike.num_parameters,
        world_size=step.world_size,
        ranks_per_node=ranks_per_node,
        mesh=axes,
        rows=step.batch.num_rows,
        num_batches=step.num_batches,
        tokens_per_step=tokens,
        flops=_flops(records, step.world_size // len(records), tokens, flops_per_token),
        stages=[_stage(index, ranks[index], step, record) for index, record in enumerate(records)],
        bubble=records[0].bubble,
        compiled=False,
        device_memory=limit,
        remedies=[],
        wasteful=[],
    )
    remedies = []
    if made.fits is False and limit is not None:
        remedies = remedies_of(
            step, ranks_per_node, made.peak, limit, lambda changed: _peak(changed, alike, ranks_per_node)
        )
    return replace(made, remedies=remedies, wasteful=wasteful(made, step))


def _peak(step: SimulatedStep, alike: Alike, ranks_per_node: int) -> int:
    _, _, firsts = _mesh(step, ranks_per_node)
    return max(sum(record.peak()[1].values()) for record in alike.records(step, firsts))


def _mesh(step: SimulatedStep, ranks_per_node: int) -> tuple[list[Axis], int, list[int]]:
    """The axes with more than one rank, the number of data ranks, and the first rank of each stage."""
    return in_child(lambda: _mesh_of_fake_ranks(step, ranks_per_node))


def _mesh_of_fake_ranks(step: SimulatedStep, ranks_per_node: int) -> tuple[list[Axis], int, list[int]]:
    join_fake_ranks(0, step.world_size)
    dims = step.parallelism.build(world_size=step.world_size, device_type="cpu")
    axes = []
    for name in AXES:
        ranks = dist.get_process_group_ranks(dims.mesh.get_group(name))
        if len(ranks) > 1:
            axes.append(Axis(name, len(ranks), ranks, len({rank // ranks_per_node for rank in ranks})))
    return axes, dims.dp_size, dist.get_process_group_ranks(dims.mesh.get_group("pp"))


def _flops(
    records: Sequence[StepRecord], ranks_each: int, tokens: int, flops_per_token: tuple[int, int] | None
) -> Flops:
    """Forward and backward are three times the forward."""
    steps = [3 * ranks_each * sum(record.flops[name] for record in records) for name in ("full", "causal")]
    if flops_per_token is not None:
        steps = [each * tokens for each in flops_per_token]
    return Flops(round(steps[0] / tokens), round(steps[1] / tokens), *steps)


def _stage(index: int, rank: int, step: SimulatedStep, record: StepRecord) -> Stage:
    place, at_peak = record.peak()
    return Stage(
        stage=index,
        rank=rank,
        num_ranks=step.world_size // step.parallelism.pipeline_parallel_degree,
        parameters=record.sizes["parameters"],
        gradients=record.sizes["gradients"],
        optimizer=record.sizes["optimizer"],
        activations=record.sizes["activations"],
        peak=sum(at_peak.values()),
        peak_in=f"{place[0]} ({place[1]})",
        at_peak=at_peak,
        collectives=[
            Collective(axis, kind, calls, record.traffic[axis, kind])
            for (axis, kind), calls in sorted(record.calls.items())
        ],
    )
