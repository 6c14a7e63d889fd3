"""Put a model on a device mesh: the transforms, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.context_parallel.transform import ContextParallelism
from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.data_parallel.transform import DataParallelism
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck, host_device_type
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.pipeline_parallel.transform import PipelineParallelism
from titan_parallel.probe.proofs import Proofs
from titan_parallel.sharding_plan.roles import Roles, RoleSpec, RoleTable
from titan_parallel.step_transforms import AuxiliaryLossScaling, LossInHead, StepCounting
from titan_parallel.tensor_parallel.transform import TensorParallelism
from titan_parallel.transforms import ParallelBuild, Transform


def parallelize(
    model: nn.Module,
    roles: RoleTable,
    dims: ParallelDims,
    *,
    activation_checkpoint: ActivationCheckpoint.Config | None = None,
    compile: Compile.Config | None = None,
    mixed_precision: MixedPrecision.Config | None = None,
    output: Callable[[Any], Tensor] | None = None,
    extra_transforms: Sequence[Transform] = (),
) -> ParallelModel:
    """Put `model` on the mesh of `dims`, in place, by the roles of its modules.

    The model is on the meta device (then call `to_empty(device)` of the result, and initialize it) or on its own
    device, with the same weights on every rank. `output` selects the logits in the output of the model where that is
    not a tensor: `operator.attrgetter("logits")`. No parameter changes its name. `extra_transforms` are third-party
    transforms, applied in order before data parallelism; they may add roles. Raises ConfigError, on every rank, for
    roles that do not fit the model, and for a model that does not fit the mesh.
    """
    with RankConsistencyCheck("parallelize", host_device_type(dims.device_type)) as consistency:
        transforms = default_transforms(
            activation_checkpoint=activation_checkpoint,
            compile=compile,
            mixed_precision=mixed_precision,
            extra=extra_transforms,
        )
        build = ParallelBuild(model, dims, Roles(model, roles, known_roles(transforms)), output)
        _compare_inputs(consistency, build)
        for name, config in (
            ("activation_checkpoint", activation_checkpoint),
            ("compile", compile),
            ("mixed_precision", mixed_precision),
            ("extra_transforms", [type(transform).__qualname__ for transform in extra_transforms] or ""),
        ):
            consistency.on(name, repr(config))
        for transform in transforms:
            transform.validate(build)
        consistency.on("sequence_parallel", str(build.dims.sequence_parallel))
        for transform in transforms[:-1]:
            transform.apply(build)
        consistency.on("transforms", "\n".join(f"{name}: {text}" for name, text in build.consistency.items()))
    transforms[-1].apply(build)  # data parallelism: ranks wait for each other
    return ParallelModel(model, build.dims, build.schedule(), build.step)


def default_transforms(
    *,
    activation_checkpoint: ActivationCheckpoint.Config | None = None,
    compile: Compile.Config | None = None,
    mixed_precision: MixedPrecision.Config | None = None,
    extra: Sequence[Transform] = (),
) -> tuple[Transform, ...]:
    """Return the transforms that `parallelize` applies, in their order.

    Context parallelism and the statistics see the whole model, so they come before the pipeline removes the modules of
    other ranks. Tensor parallelism splits what is left. Around each unit stand, from the inside: local parameters,
    activation checkpointing, compilation. FSDP comes last, around all of these.
    """
    checkpointing = None if activation_checkpoint is None else activation_checkpoint.build()
    compiler = None if compile is None else compile.build()
    precision = None if mixed_precision is None else mixed_precision.build()
    proofs = Proofs()
    return (
        ContextParallelism(proofs.context),
        StepCounting(),
        AuxiliaryLossScaling(),
        PipelineParallelism(
            proofs.stages,
            param_dtype=None if precision is None else precision.param_dtype,
            recomputes=checkpointing is not None,
            compiles=compiler is not None,
        ),
        TensorParallelism(proofs.tensor),
        *([] if checkpointing is None else [checkpointing]),
        *([] if compiler is None else [compiler]),
        LossInHead(),
        *extra,
        DataParallelism(precision),
    )


def known_roles(transforms: Sequence[Transform]) -> dict[str, RoleSpec]:
    """Return the union of the roles that transforms read, with the options of all."""
    known: dict[str, RoleSpec] = {}
    for transform in transforms:
        for name, spec in transform.roles.items():
            if known.setdefault(name, spec).of_parameters != spec.of_parameters:
                raise ConfigError(
                    f"The role {name} must be one of modules or of parameters in all transforms, got both in "
                    f"{type(transform).__qualname__} and in another."
                )
            known[name] = RoleSpec({*known[name].options, *spec.options}, spec.of_parameters)
    return known


def _compare_inputs(consistency: RankConsistencyCheck, build: ParallelBuild) -> None:
    consistency.on("degrees", repr(build.dims.config))
    consistency.on("roles", str(build.roles))
    consistency.on("parameters", _described(build.model))
    consistency.on("weights", _first_values(build.model))


def _first_values(model: nn.Module) -> str:
    """Return the first numbers of each plain parameter that has memory: other initial weights show there."""
    plain = {name: p.data for name, p in model.named_parameters() if type(p.data) is Tensor and not p.is_meta}
    return "\n".join(f"{name} begins with {weight.flatten()[:4].tolist()}" for name, weight in plain.items())


def _described(model: nn.Module) -> str:
    """Return a line with name, shape and dtype for each parameter."""
    lines = (
        f"{name} {list(p.shape)} {str(p.dtype).removeprefix('torch.')}{'' if p.requires_grad else ' frozen'}"
        for name, p in model.named_parameters(remove_duplicate=False)
    )
    return "\n".join(lines)
