"""`plan`: a dry run of a training step."""

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
from titan_parallel.planning.advice import suggest_changes, warnings_of
from titan_parallel.planning.child import run_in_child
from titan_parallel.planning.extrapolation import Extrapolator
from titan_parallel.planning.record import StepRecord
from titan_parallel.planning.report import Axis, Collective, Flops, Plan, Stage
from titan_parallel.planning.simulate import BatchSpec, BuildOptimizer, SimulatedStep
from titan_parallel.planning.sizes import parse_bytes
from titan_parallel.sharding_plan.roles import RoleTable
from titan_parallel.step.batch import Batch, Loss
from titan_parallel.transforms import Transform


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
    extra_transforms: Sequence[Transform] = (),
    also: Callable[[ParallelDims], None] | None = None,
    flops_per_token: tuple[int, int] | None = None,
    device_memory: int | str | None = None,
    ranks_per_node: int = 8,
    rank: int | None = None,
    every_block: bool = False,
) -> Plan:
    """Make a dry run of a training step: memory, FLOPs and communication of each rank, on any number of ranks.

    The dry run executes the code of `parallelize`, `forward_backward`, clipping and the optimizer on fake tensors, in a
    fake process group: it needs no GPU and no memory for weights. Everything runs in forked children, so this process
    may be a rank of another group. Returns a `Plan`; `print` shows it as text. Raises ConfigError for everything that
    `parallelize` rejects.

    Args:
        build: Build the model; called on the meta device.
        batch: One micro-batch of a data rank, of which only shapes and dtypes are read.
        loss: The loss, as for `forward_backward`.
        optimizer: `optimizer(named_parameters)` returns a `torch.optim.Optimizer`, or another object with its `state`,
            `step` and `zero_grad`.
        world_size: Number of ranks of the planned run.
        parallelism: Degrees of parallelism. None: FSDP over all ranks.
        num_batches: Micro-batches of each data rank in a step.
        roles: Table of roles. None: `model.roles()`.
        activation_checkpoint: As for `parallelize`.
        compile: As for `parallelize`. Compiled blocks are simulated as eager ones, which save no fewer activations and
            compute no less.
        mixed_precision: As for `parallelize`.
        output: As for `parallelize`.
        extra_transforms: As for `parallelize`.
        also: `also(dims)` runs the other collectives of a step of the training loop.
        flops_per_token: (full, causal), for a model that states them. None: three times the counted FLOPs of a forward.
        device_memory: Memory of one device, in bytes or as text such as "80GiB". If given, the plan says whether the
            run fits, and suggests changes if it does not.
        ranks_per_node: Ranks of one node, consecutive.
        rank: The rank to simulate. None: the first rank of each pipeline stage, which has the largest shard of every
            tensor that does not divide evenly.
        every_block: Simulate every block. By default a few of equivalent blocks are simulated, and the results are
            extrapolated.
    """
    step = SimulatedStep(
        build=build,
        roles=roles,
        parallelism=parallelism or ParallelDims.Config(),
        world_size=world_size,
        batch=BatchSpec.of(batch),
        num_batches=num_batches,
        loss=loss,
        build_optimizer=optimizer,
        activation_checkpoint=activation_checkpoint,
        mixed_precision=mixed_precision,
        output=output,
        extra_transforms=extra_transforms,
        also=also,
    )
    limit = parse_bytes(device_memory) if isinstance(device_memory, str) else device_memory

    made = _planned(step, Extrapolator(step, every_block), rank, flops_per_token, limit, ranks_per_node)
    return replace(made, compiled=compile is not None)


def _planned(
    step: SimulatedStep,
    extrapolator: Extrapolator,
    rank: int | None,
    flops_per_token: tuple[int, int] | None,
    limit: int | None,
    ranks_per_node: int,
) -> Plan:
    axes, dp_size, firsts = _mesh(step, ranks_per_node)
    ranks = firsts if rank is None else [rank]
    records = extrapolator.records(step, ranks)
    tokens = step.batch.num_tokens * step.num_batches * dp_size
    made = Plan(
        model=extrapolator.model_name,
        num_parameters=extrapolator.num_parameters,
        world_size=step.world_size,
        ranks_per_node=ranks_per_node,
        mesh=axes,
        local_batch_size=step.batch.batch_size,
        num_batches=step.num_batches,
        tokens_per_step=tokens,
        flops=_flops(records, step.world_size // len(records), tokens, flops_per_token),
        stages=[_stage(index, ranks[index], step, record) for index, record in enumerate(records)],
        bubble=records[0].bubble,
        compiled=False,
        device_memory=limit,
        suggestions=[],
        warnings=[],
    )
    suggestions = []
    if made.fits is False and limit is not None:
        suggestions = suggest_changes(
            step, ranks_per_node, made.peak, limit, lambda changed: _peak(changed, extrapolator, ranks_per_node)
        )
    return replace(made, suggestions=suggestions, warnings=warnings_of(made, step))


def _peak(step: SimulatedStep, extrapolator: Extrapolator, ranks_per_node: int) -> int:
    _, _, firsts = _mesh(step, ranks_per_node)
    return max(sum(record.peak()[1].values()) for record in extrapolator.records(step, firsts))


def _mesh(step: SimulatedStep, ranks_per_node: int) -> tuple[list[Axis], int, list[int]]:
    """Return the axes with more than one rank, the number of data ranks, and the first rank of each stage."""
    return run_in_child(lambda: _mesh_of_fake_ranks(step, ranks_per_node))


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
    """Return the FLOPs of forward and backward, which are three times those of the forward."""
    steps = [3 * ranks_each * sum(record.flops[name] for record in records) for name in ("full", "causal")]
    if flops_per_token is not None:
        steps = [each * tokens for each in flops_per_token]
    return Flops(round(steps[0] / tokens), round(steps[1] / tokens), *steps)


def _stage(index: int, rank: int, step: SimulatedStep, record: StepRecord) -> Stage:
    site, at_peak = record.peak()
    return Stage(
        stage=index,
        rank=rank,
        num_ranks=step.world_size // step.parallelism.pipeline_parallel_degree,
        parameters=record.sizes["parameters"],
        gradients=record.sizes["gradients"],
        optimizer=record.sizes["optimizer"],
        activations=record.sizes["activations"],
        peak=sum(at_peak.values()),
        peak_in=f"{site[0]} ({site[1]})",
        at_peak=at_peak,
        collectives=[
            Collective(axis, kind, calls, record.traffic[axis, kind])
            for (axis, kind), calls in sorted(record.calls.items())
        ],
    )
