"""One engine for all models: what is applied to a model, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.accumulation import Accumulation
from titan_parallel.activation_checkpoint import ActivationCheckpoint
from titan_parallel.agreement import Agreement, host_device_type
from titan_parallel.compile import Compile
from titan_parallel.dims import ParallelDims
from titan_parallel.head import HeadForward
from titan_parallel.loss_forward import LossForward
from titan_parallel.mixed_precision import MixedPrecision
from titan_parallel.own_losses import OwnLosses
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.roles import Roles, RoleTable
from titan_parallel.tallies import Tallies

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from titan_parallel.context_parallel import ContextParallel
    from titan_parallel.stages import Stages
    from titan_parallel.tensor_parallel import TensorParallel


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

    The model is on meta (then call `parallel.model.to_empty(device=...)` and initialise it) or on its device, with the
    same weights on every rank. `output` finds the logits in what the model returns where that is more than a tensor:
    `operator.attrgetter("logits")`. No parameter changes its name. Raises ConfigError for roles that do not fit the
    model, and for a model that does not fit the mesh.
    """
    with Agreement("parallelize", host_device_type(dims.device_type)) as agreement:  # what fails, fails on every rank
        matched = Roles(model, roles)
        recomputation = activation_checkpoint.build() if activation_checkpoint is not None else None
        compiler = compile.build() if compile is not None else None
        precision = mixed_precision.build() if mixed_precision is not None else None
        agreement.on("degrees", repr(dims.config))
        agreement.on("roles", str(matched))
        agreement.on("parameters", _described(model))
        agreement.on("weights", _first_values(model))
        agreement.on("activation_checkpoint", repr(activation_checkpoint))
        agreement.on("compile", repr(compile))
        agreement.on("mixed_precision", repr(mixed_precision))

        # The order: context, stages, tensor and sequence parallel, recomputation, compilation, data parallel.
        _check_tensor_parallel(model, matched, dims)
        context = _share_sequences(model, matched, dims)
        tallies = Tallies(model, matched, dims)
        stages = _cut_into_stages(model, matched, dims, recomputation, compiler, precision)
        agreement.on("stages", "" if stages is None else repr(stages.schedule))
        held = matched if stages is None else matched.held(stages.held)
        tensor_parallel = _split_over_tensor_ranks(model, held, dims)
        partial = tensor_parallel.partial_gradients if tensor_parallel is not None else None
        _wrap_blocks(model, matched, tensor_parallel, recomputation, compiler)
        head = _let_head_take_loss(model, held, tensor_parallel)
        if tensor_parallel is not None:
            model.forward = tensor_parallel.local_view("")(model.forward)
    forward = LossForward(model, dims.device_type, head=head, output=output, context=context)
    root = model if stages is None else stages.around(forward)
    units = _shard_over_data_ranks(model, held, dims, precision, root)

    return ParallelModel(
        model,
        dims,
        schedule=Accumulation(forward, units, reduces_each=_reduces_each(dims))
        if stages is None
        else stages.pipeline(units),
        partial_gradients=partial,
        tallies=tallies,
        own_losses=OwnLosses(model, matched, num_tensor=dims.num_tensor, device_type=dims.device_type),
        context=context,
        names_elsewhere=() if stages is None else stages.names_elsewhere,
        counted_elsewhere=() if stages is None else stages.counted_elsewhere,
    )


def _check_tensor_parallel(model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
    """On every rank, for all parts of the model, while it is whole."""
    if dims.num_tensor > 1:
        from titan_parallel.tensor_parallel_checks import check_can_be_split

        check_can_be_split(model, roles, dims)


def _reduces_each(dims: ParallelDims) -> bool:
    """Whether each micro-batch's gradients are brought to the ranks that own them: where ranks own parts."""
    return dims.config.fsdp_reduce_gradients == "always" and dims.num_shard * dims.num_context > 1


def _share_sequences(model: nn.Module, roles: Roles, dims: ParallelDims) -> ContextParallel | None:
    if dims.num_context == 1:
        return None
    from titan_parallel.context_parallel import ContextParallel

    return ContextParallel(model, roles, dims)


def _cut_into_stages(
    model: nn.Module,
    roles: Roles,
    dims: ParallelDims,
    recomputation: ActivationCheckpoint | None,
    compiler: Compile | None,
    precision: MixedPrecision | None,
) -> Stages | None:
    """Take out of the model what other ranks of the pipeline hold."""
    if dims.num_pipeline == 1:
        return None
    from titan_parallel.pipeline_schedules import schedule_of
    from titan_parallel.stages import Stages

    schedule = schedule_of(dims)
    if compiler is not None and schedule.splits_backward:
        raise ConfigError(
            f"Got the pipeline schedule {schedule.name} with compiled blocks. It takes the gradients of weights apart "
            "from those of inputs, which compiled code computes together. Set compile to None, or take 1F1B or "
            "Interleaved1F1B."
        )
    dtype = None if precision is None else precision.param_dtype
    return Stages(model, roles, schedule, dims, dtype=dtype, recomputes=recomputation is not None)


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
    if dims.num_tensor == 1:
        return None
    from titan_parallel.tensor_parallel import TensorParallel

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
    for index, name in enumerate(blocks):
        block = model.get_submodule(name)
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
    if dims.world_size == 1 and (precision is None or not precision.changes(model)):
        return []
    from titan_parallel.data_parallel import shard_over_data_ranks

    return shard_over_data_ranks(model, roles, dims, precision, root)
