"""Shard a model with FSDP2: sharded (FSDP), replicated (DDP), or both (HSDP)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.sharding_plan.units import modules_of_several_units, units_of


def shard_over_data_ranks(
    model: nn.Module, roles: Roles, dims: ParallelDims, mixed_precision: MixedPrecision | None, root: nn.Module
) -> list[FSDPModule]:
    """Shard each block or unit, the embedding, the head, and the rest with tied weights, and return the FSDP units.

    `root` is the model, or the module that runs it. FSDP averages gradients over the ranks of the mesh, as a custom
    training loop expects, whose loss is the mean over the sequences of a rank.
    """
    options: dict[str, Any] = {
        "mesh": dims.fsdp_mesh,
        "shard_placement_fn": _placement_over(dims.dp_shard_size * dims.cp_size),
    }
    if mixed_precision is not None:
        options["mp_policy"] = mixed_precision.policy()
    ends = [name for role in ("embedding", "head") for name in roles.named(role)]
    for module in (*modules_of_several_units(model, roles), *units_of(model, roles).values()):
        if any(True for _ in module.parameters()):
            fully_shard(module, reshard_after_forward=_frees_weights(dims), **options)
    for name in _without_shared_parameters(model, ends):
        fully_shard(
            model.get_submodule(name), reshard_after_forward=_frees_weights(dims, early=name == roles.head), **options
        )
    fully_shard(root, reshard_after_forward=_frees_weights(dims, early=True), **options)
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _placement_over(num_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Return a function that chooses the dim in which FSDP shards a parameter; None is the first dim.

    The first dim of a stack of matrices counts experts, and most large runs have fewer experts than ranks. Another dim
    is sharded then, if it divides evenly and tensor ranks do not split it.
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() < 3 or len(parameter) % num_ranks == 0:
            return None
        taken = parameter.placements if isinstance(parameter, DTensor) else ()
        dims = (dim for dim in range(1, parameter.dim()) if parameter.shape[dim] % num_ranks == 0)
        return next((Shard(dim) for dim in dims if Shard(dim) not in taken), None)

    return place


def _frees_weights(dims: ParallelDims, *, early: bool = False) -> bool:
    """Return whether a unit frees its gathered weights after the forward; `early` units come first in the backward.

    Under a pipeline, forwards and backwards alternate: freed weights would be gathered again for each micro-batch.
    """
    choice = dims.config.fsdp_reshard_after_forward
    if dims.dp_shard_size * dims.cp_size == 1 or choice == "never":
        return False
    return choice == "always" or (dims.pp_size == 1 and not early)


def _without_shared_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """Return the modules among `names` that share no parameter.

    Tied weights belong to the root, and so do those of a module that stands in several places.
    """
    owners = Counter(
        parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None
    )
    users = Counter(parameter for name in names for parameter in model.get_submodule(name).parameters())
    return [name for name in names if all(owners[p] == users[p] == 1 for p in model.get_submodule(name).parameters())]
