"""One engine for all models: what is applied to a model, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.activation_checkpoint import ActivationCheckpoint
from titan_parallel.compile import Compile
from titan_parallel.dims import ParallelDims
from titan_parallel.head import HeadForward
from titan_parallel.mixed_precision import MixedPrecision
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.roles import Roles, RoleTable


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
    matched = Roles(model, roles)
    precision = mixed_precision.build() if mixed_precision is not None else None
    if precision is not None and not precision.changes(model):
        precision = None
    tensor_parallel = None
    if dims.num_tensor > 1:
        from titan_parallel.tensor_parallel import TensorParallel

        tensor_parallel = TensorParallel(model, matched, dims)
    partial = tensor_parallel.partial_parameters() if tensor_parallel is not None else []

    # What a block does when it is called, from the inside out.
    recomputation = activation_checkpoint.build() if activation_checkpoint is not None else None
    compiler = compile.build() if compile is not None else None
    for index, name in enumerate(_blocks(matched, recomputation, compiler)):
        block = model.get_submodule(name)
        local = tensor_parallel.local_view(name) if tensor_parallel is not None else _as_it_is
        if tensor_parallel is not None:
            block.forward = local(block.forward)
        if recomputation is not None:
            block.forward = recomputation.wrap(block.forward, index)
        if compiler is not None:
            block.forward = local(compiler.wrap(block.forward))
    head = None
    if matched.head is not None:
        module = model.get_submodule(matched.head)
        head = (
            tensor_parallel.head_forward(matched.head) if tensor_parallel is not None else HeadForward(module.forward)
        )
        module.forward = head
    if tensor_parallel is not None:
        model.forward = tensor_parallel.local_view("")(model.forward)

    # One rank that computes in the dtype it stores needs no more: it runs at the speed of the plain model.
    units: list[Any] = []
    if dims.world_size > 1 or precision is not None:
        from titan_parallel.data_parallel import shard_over_data_ranks

        units = shard_over_data_ranks(model, matched, dims, precision)
    return ParallelModel(model, dims, head=head, units=units, partial_parameters=partial, output=output or _as_it_is)


def _blocks(roles: Roles, recomputation: ActivationCheckpoint | None, compiler: Compile | None) -> list[str]:
    blocks = roles.named("block")
    if not blocks and (recomputation is not None or compiler is not None):
        raise ConfigError(
            "Got recomputation or compilation for roles without a block. Both work block by block. Give the role "
            "block to the layers of the model, or turn them off."
        )
    return blocks


def _as_it_is(value: Any) -> Any:
    return value
