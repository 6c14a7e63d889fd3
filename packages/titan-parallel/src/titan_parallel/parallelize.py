"""One engine for all models: what is applied to a model, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck, host_device_type
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.probe.checks import ContextCheck, StageCheck, probe_for, settle_tensor_parallel
from titan_parallel.sharding_plan.roles import Roles, RoleTable
from titan_parallel.sharding_plan.units import blocks_of, check_weights_of_blocks, with_role_errors
from titan_parallel.step.auxiliary_losses import AuxiliaryLosses
from titan_parallel.step.forward_loss import LossForward
from titan_parallel.step.gradient_accumulation import Accumulation, Schedule
from titan_parallel.step.loss_in_head import HeadForward
from titan_parallel.step.statistics import StepStatistics

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from titan_parallel.context_parallel.apply import ContextParallel
    from titan_parallel.pipeline_parallel.partition import Stages
    from titan_parallel.pipeline_parallel.stage_runner import StageRunner
    from titan_parallel.probe.token_probe import TokenProbe
    from titan_parallel.tensor_parallel.apply import TensorParallel


def parallelize(
    model: nn.Module,
    roles: RoleTable,
    dims: ParallelDims,
    *,
    activation_checkpoint: ActivationCheckpoint.Config | None = None,
    compile: Compile.Config | None = None,
    mixed_precision: MixedPrecision.Config | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> ParallelModel:
    """Put `model` on the mesh of `dims`, in place, by what its parts are.

    The model is on meta (then call `to_empty(device)` of what is returned, and initialize it) or on its device, with
    the same weights on every rank. `output` finds the logits in what the model returns where that is no tensor:
    `operator.attrgetter("logits")`. No parameter changes its name. Raises ConfigError for roles that do not fit the
    model, and for a model that does not fit the mesh.
    """
    with RankConsistencyCheck(
        "parallelize", host_device_type(dims.device_type)
    ) as consistency:  # what fails, fails on every rank
        matched = Roles(model, roles)
        _agree_on(consistency, model, matched, dims, (activation_checkpoint, compile, mixed_precision))
        options = _Options.of(activation_checkpoint, compile, mixed_precision, output)
        probe = probe_for(model, matched, dims)  # of the whole model, before any part of it is changed
        dims = settle_tensor_parallel(model, matched, dims, probe)
        consistency.on("sequence_parallel", str(dims.sequence_parallel))
        transformed = _transformed(model, matched, dims, options, probe)
        consistency.on("stages", "" if transformed.stages is None else repr(transformed.stages.schedule))
    return _joined(model, matched, dims, options, transformed)


@dataclass(frozen=True)
class _Options:
    recomputation: ActivationCheckpoint | None
    compiler: Compile | None
    precision: MixedPrecision | None
    output: Callable[[Any], Tensor] | None

    @classmethod
    def of(
        cls,
        recomputation: ActivationCheckpoint.Config | None,
        compile: Compile.Config | None,
        precision: MixedPrecision.Config | None,
        output: Callable[[Any], Tensor] | None,
    ) -> _Options:
        return cls(
            None if recomputation is None else recomputation.build(),
            None if compile is None else compile.build(),
            None if precision is None else precision.build(),
            output,
        )


@dataclass(frozen=True)
class _Transformed:
    """What was applied to a model; `held` are the roles of what this rank holds."""

    held: Roles
    context: ContextParallel | None
    statistics: StepStatistics
    stages: Stages | None
    tensor_parallel: TensorParallel | None
    head: HeadForward | None


def _agree_on(
    consistency: RankConsistencyCheck, model: nn.Module, roles: Roles, dims: ParallelDims, configs: Sequence[Any]
) -> None:
    consistency.on("degrees", repr(dims.config))
    consistency.on("roles", str(roles))
    consistency.on("parameters", _described(model))
    consistency.on("weights", _first_values(model))
    for name, config in zip(("activation_checkpoint", "compile", "mixed_precision"), configs, strict=True):
        consistency.on(name, repr(config))


def _transformed(
    model: nn.Module, roles: Roles, dims: ParallelDims, options: _Options, probe: TokenProbe | None
) -> _Transformed:
    """In this order: context, stages, tensor and sequence parallel, recomputation, compilation; then data parallel."""
    recomputation, compiler = options.recomputation, options.compiler
    if dims.world_size > 1:
        check_weights_of_blocks(model, roles)
    context = _share_sequences(model, roles, dims, probe)
    statistics = StepStatistics(model, roles, dims)
    stages = _cut_into_stages(model, roles, dims, options, probe)
    held = roles if stages is None else roles.without(stages.taken_out)
    tensor_parallel = _split_over_tensor_ranks(model, held, dims)
    _wrap_blocks(model, roles, tensor_parallel, recomputation, compiler)
    head = _let_head_take_loss(model, held, tensor_parallel)
    if tensor_parallel is not None:
        model.forward = tensor_parallel.local_view("")(model.forward)
    if dims.world_size > 1:
        model.forward = with_role_errors(model.forward, roles)
    return _Transformed(held, context, statistics, stages, tensor_parallel, head)


def _joined(
    model: nn.Module, roles: Roles, dims: ParallelDims, options: _Options, transformed: _Transformed
) -> ParallelModel:
    """Shard over data ranks, which wait for each other, and join the parts."""
    stages, tensor_parallel = transformed.stages, transformed.tensor_parallel
    forward = LossForward(
        model, dims.device_type, head=transformed.head, output=options.output, context=transformed.context
    )
    runner = None if stages is None else stages.around(forward)
    units = _shard_over_data_ranks(model, transformed.held, dims, options.precision, runner or model)
    return ParallelModel(
        model,
        dims,
        schedule=Accumulation(forward, units, reduces_each=_reduces_each(dims))
        if stages is None
        else _pipeline(stages, runner, units),
        partial_gradients=tensor_parallel.partial_gradients if tensor_parallel is not None else None,
        statistics=transformed.statistics,
        auxiliary_losses=AuxiliaryLosses(model, roles, tp_size=dims.tp_size, device_type=dims.device_type),
        context=transformed.context,
        nonlocal_parameters=() if stages is None else stages.nonlocal_parameters,
        duplicate_parameters=() if stages is None else stages.duplicate_parameters,
    )


def _pipeline(stages: Stages, runner: StageRunner | None, units: list[FSDPModule]) -> Schedule:
    from titan_parallel.pipeline_parallel.schedule import Pipeline

    assert runner is not None
    return Pipeline(runner, stages, units)


def _reduces_each(dims: ParallelDims) -> bool:
    """Return whether each micro-batch's gradients are brought to the ranks that own them: where ranks own parts."""
    return dims.config.fsdp_reduce_gradients == "always" and dims.dp_shard_size * dims.cp_size > 1


def _share_sequences(
    model: nn.Module, roles: Roles, dims: ParallelDims, probe: TokenProbe | None
) -> ContextParallel | None:
    if dims.cp_size == 1 or probe is None:
        return None
    from titan_parallel.context_parallel.apply import ContextParallel

    return ContextParallel(model, roles, dims, lambda: ContextCheck(probe, dims))


def _cut_into_stages(
    model: nn.Module,
    roles: Roles,
    dims: ParallelDims,
    options: _Options,
    probe: TokenProbe | None,
) -> Stages | None:
    """Take out of the model what other ranks of the pipeline hold."""
    if dims.pp_size == 1:
        return None
    assert probe is not None  # probe_for makes one for pipelines
    from titan_parallel.pipeline_parallel.partition import Stages
    from titan_parallel.pipeline_parallel.schedule_registry import schedule_of

    if len(roles.stacks) > 1:
        raise ConfigError(
            f"pipeline_parallel_degree must be 1 for several stacks of blocks, got {dims.pp_size} with blocks in "
            f"{' and in '.join(parent or 'the model' for parent in roles.stacks)}. Give the role block to one list of "
            "layers, or set pipeline_parallel_degree to 1."
        )
    schedule = schedule_of(dims)
    if options.compiler is not None and schedule.splits_backward:
        raise ConfigError(
            f"Got the pipeline schedule {schedule.name} with compiled blocks. It takes the gradients of weights apart "
            "from those of inputs, which compiled code computes together. Set compile to None, or take 1F1B or "
            "Interleaved1F1B."
        )
    dtype = None if options.precision is None else options.precision.param_dtype
    recomputes = options.recomputation is not None
    return Stages(
        model, roles, schedule, dims, check=lambda cut: StageCheck(probe, cut), dtype=dtype, recomputes=recomputes
    )


def _first_values(model: nn.Module) -> str:
    """A few numbers of each plain parameter that has memory: ranks that drew other weights have others."""
    plain = {name: p.data for name, p in model.named_parameters() if type(p.data) is Tensor and not p.is_meta}
    return "\n".join(f"{name} begins with {weight.flatten()[:4].tolist()}" for name, weight in plain.items())


def _described(model: nn.Module) -> str:
    """A line for each parameter: what ranks must have alike."""
    lines = (
        f"{name} {list(p.shape)} {str(p.dtype).removeprefix('torch.')}{'' if p.requires_grad else ' frozen'}"
        for name, p in model.named_parameters(remove_duplicate=False)
    )
    return "\n".join(lines)


def _split_over_tensor_ranks(model: nn.Module, roles: Roles, dims: ParallelDims) -> TensorParallel | None:
    if dims.tp_size == 1:
        return None
    from titan_parallel.tensor_parallel.apply import TensorParallel

    return TensorParallel(model, roles, dims)


def _wrap_blocks(
    model: nn.Module,
    roles: Roles,
    tensor_parallel: TensorParallel | None,
    recomputation: ActivationCheckpoint | None,
    compiler: Compile | None,
) -> None:
    """From the inside out: local parameters inside what is replayed, recomputation, compilation, local parameters."""
    blocks = roles.named("block")
    if not blocks and (recomputation is not None or compiler is not None):
        raise ConfigError(
            "Got recomputation or compilation for roles without a block. Both work block by block. Give the role block "
            "to the layers of the model, or turn them off."
        )
    for index, block in enumerate(blocks_of(model, roles)):
        name = next(name for name in blocks if model.get_submodule(name) is block)
        view = tensor_parallel.local_view(name) if tensor_parallel is not None else None
        if view is not None:
            block.forward = view(block.forward)
        if recomputation is not None:
            block.forward = recomputation.wrap(block.forward, index)
        if compiler is not None:
            block.forward = compiler.wrap(block.forward)
            if view is not None:
                block.forward = view(block.forward)


def _let_head_take_loss(model: nn.Module, roles: Roles, tensor_parallel: TensorParallel | None) -> HeadForward | None:
    if roles.head is None:
        return None
    head = model.get_submodule(roles.head)
    forward = HeadForward(head.forward) if tensor_parallel is None else tensor_parallel.head_forward(roles.head)
    head.forward = forward
    return forward if roles.options(roles.head).get("takes_loss", True) else None


def _shard_over_data_ranks(
    model: nn.Module, roles: Roles, dims: ParallelDims, precision: MixedPrecision | None, root: nn.Module
) -> list[FSDPModule]:
    """One rank that computes in the dtype it stores needs no units: it runs as fast as the plain model."""
    if precision is not None and (precision.param_dtype is not torch.float32 or precision.changes(model)):
        precision.cast_inputs(model, blocks_of(model, roles))
    if dims.world_size == 1 and (precision is None or not precision.changes(model)):
        return []
    from titan_parallel.data_parallel.fsdp import shard_over_data_ranks

    return shard_over_data_ranks(model, roles, dims, precision, root)
