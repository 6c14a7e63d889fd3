"""Data parallel of every shape by FSDP2: sharded, replicated, or both."""

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
from titan_parallel.sharding_plan.units import blocks_of, modules_of_several_blocks


def shard_over_data_ranks(
    model: nn.Module, roles: Roles, dims: ParallelDims, mixed_precision: MixedPrecision | None, root: nn.Module
) -> list[FSDPModule]:
    """Make each block, the embedding, the head, and the rest with tied weights, a unit gathered and reduced at once.

    `root` is the model, or what runs it. Gradients are averaged over the ranks of the mesh, which is what a loop of
    somebody's own expects, where the loss is the mean over a rank's rows. Returns the units.
    """
    options: dict[str, Any] = {
        "mesh": dims.fsdp_mesh,
        "shard_placement_fn": _placement_over(dims.dp_shard_size * dims.cp_size),
    }
    if mixed_precision is not None:
        options["mp_policy"] = mixed_precision.policy()
    ends = [name for role in ("embedding", "head") for name in roles.named(role)]
    for module in (*modules_of_several_blocks(model, roles), *blocks_of(model, roles)):
        if any(True for _ in module.parameters()):
            fully_shard(module, reshard_after_forward=_frees_weights(dims), **options)
    for name in _without_shared_parameters(model, ends):
        fully_shard(
            model.get_submodule(name), reshard_after_forward=_frees_weights(dims, early=name == roles.head), **options
        )
    fully_shard(root, reshard_after_forward=_frees_weights(dims, early=True), **options)
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _placement_over(num_ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Which dim of a parameter is sharded: the first (None), unless ranks would hold nothing of a stack of matrices.

    There are fewer experts than ranks in most large runs; then one of the other dims is split, if it can be evenly,
    and if tensor ranks do not split it.
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() < 3 or len(parameter) % num_ranks == 0:
            return None
        taken = parameter.placements if isinstance(parameter, DTensor) else ()
        dims = (dim for dim in range(1, parameter.dim()) if parameter.shape[dim] % num_ranks == 0)
        return next((Shard(dim) for dim in dims if Shard(dim) not in taken), None)

    return place


def _frees_weights(dims: ParallelDims, *, early: bool = False) -> bool:
    """Return whether a unit frees its gathered weights after the forward; `early` ones are the first in the backward.

    A pipeline goes to and fro: freed weights would be gathered for each micro-batch.
    """
    choice = dims.config.fsdp_reshard_after_forward
    if dims.dp_shard_size * dims.cp_size == 1 or choice == "never":
        return False
    return choice == "always" or (dims.pp_size == 1 and not early)


def _without_shared_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the modules that own all of their parameters alone: tied weights belong to the root.

    So do those of a module that lies in several, such as a block that several layers call.
    """
    owners = Counter(
        parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None
    )
    users = Counter(parameter for name in names for parameter in model.get_submodule(name).parameters())
    return [name for name in names if all(owners[p] == users[p] == 1 for p in model.get_submodule(name).parameters())]
