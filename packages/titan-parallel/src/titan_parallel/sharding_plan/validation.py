"""Return whether a model's parts can be split over the tensor axis."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel.mesh.parallel_dims import ParallelDims, one_of
from titan_parallel.sharding_plan.features import Features, side_by_side
from titan_parallel.sharding_plan.roles import Roles

NOT_SPLIT = {
    "residual": "adds the stream to its own output, which would then be added once a rank",
    "alibi": "is given position biases of all heads, of which each rank has some",
}
"""What a region cannot be, by a parameter of its forward that tells."""


def check_can_be_split(model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
    """Raise ConfigError naming the first part that cannot be split, and the degrees that would do."""
    size = dims.tp_size
    if not roles.named("region") and not roles.named("colwise"):
        raise ConfigError(
            f"Got tensor_parallel_degree {size} and roles without a region. Tensor parallel splits the work of "
            "regions. Name the model's regions and their colwise and rowwise parts, or set tensor_parallel_degree to 1."
        )
    if dims.sequence_parallel and not has_ends(roles):
        raise ConfigError(
            "sequence_parallel must be false without an embedding, a head and one stack of blocks, got true."
        )
    for name in roles.named("region"):
        _check_region(model.get_submodule(name), name)
    for name in roles.named("colwise"):
        _check_colwise(model, roles, name, size)
    for name in roles.named("rowwise"):
        _check_shared(size, [Features(_num_features(model, roles, name, "rowwise"))], name)
    for name in roles.named("norm"):
        if roles.options(name):
            _check_heads(model.get_submodule(name).get_parameter("weight").numel(), roles.options(name), name, size)
    for name in roles.named("per_head"):
        count = len(model.get_parameter(name))
        _check_shared(size, [Features(count, "heads", heads=count)], name)
    for role in ("embedding", "head"):
        for name in roles.named(role):
            rows = _num_features(model, roles, name, role)
            if rows <= (size - 1) * -(-rows // size):
                raise ConfigError(
                    f"Got a vocabulary of {rows} in {name} over tensor_parallel_degree {size}. Each rank holds at "
                    "least one row. Lower tensor_parallel_degree."
                )


def has_ends(roles: Roles) -> bool:
    """Return whether the roles say where a stream that is split over the sequence begins and ends."""
    return len(roles.stacks) == 1 and all(roles.named(role) for role in ("embedding", "head"))


def features_dim(role: str, options: Mapping[str, Any]) -> int:
    """The dim, from the end, in which a role splits the features of its matrix, or of a stack of matrices.

    They are `[out, in]`, or `[in, out]` if they are `transposed`.
    """
    return -1 if (role == "rowwise") != bool(options.get("transposed")) else -2


def one_split_dim(dims: set[int | None], name: str, parameter: nn.Parameter) -> int | None:
    """The one dim in which all who share a parameter split it. Raises ConfigError where they differ."""
    if len(dims) > 1:
        raise ConfigError(
            f"Got a shared {name} of shape {list(parameter.shape)} that only some of its owners split. Tied weights "
            "are split alike. Give roles to both: embedding to the one, head to the other."
        )
    return next(iter(dims))


def _check_region(region: nn.Module, name: str) -> None:
    parameters = inspect.signature(region.forward).parameters
    for parameter, reason in NOT_SPLIT.items():
        if parameter in parameters:
            raise ConfigError(
                f"Got the region {name}, whose forward takes {parameter!r}. A region that {reason}, cannot be split "
                "over tensor ranks. Set tensor_parallel_degree to 1, and shard with data_parallel_shard_degree."
            )


def _check_colwise(model: nn.Module, roles: Roles, name: str, size: int) -> None:
    options, count = roles.options(name), _num_features(model, roles, name, "colwise")
    beside = {
        role: [n for n in roles.named(role) if _share_a_region(roles, n, name)] for role in ("colwise", "rowwise")
    }
    taken = sum(_num_features(model, roles, rowwise, "rowwise") for rowwise in beside["rowwise"])
    if "packed" not in options and count > taken > 0:
        raise ConfigError(
            f"Got {count} output features of {name}, of which {' and '.join(beside['rowwise'])} takes {taken}. Several "
            'projections lie in it, side by side ("packed": their number, with "num_heads" and "num_kv_heads" if these '
            'differ), or head by head ("packed": 1 and "num_heads"). Add the options that say which.'
        )
    heads = [features for other in beside["colwise"] for features in side_by_side(0, roles.options(other))]
    _check_heads(count, options, name, size, [features for features in heads if features.heads])


def _share_a_region(roles: Roles, name: str, other: str) -> bool:
    region = roles.region_of(name)
    return region is not None and region == roles.region_of(other)


def _check_heads(count: int, options: Mapping[str, Any], name: str, size: int, beside: Sequence[Features] = ()) -> None:
    projections = side_by_side(count, options)
    units = sum(features.heads or 1 for features in projections)
    if len(projections) == 1 and "num_heads" in options and "num_kv_heads" in options:
        raise ConfigError(
            f"Got num_heads and num_kv_heads of {name}, which is one projection. The two tell projections side by side "
            "apart. Add packed, their number, or take one of the two away."
        )
    if count % units:
        raise ConfigError(
            f"Got {count} features of {name} and options {dict(options)} that make {units} equal parts of them. Their "
            "number divides that of the features. Correct the options."
        )
    _check_shared(size, projections, name, beside)


def _check_shared(size: int, projections: Sequence[Features], name: str, beside: Sequence[Features] = ()) -> None:
    """Raise ConfigError where ranks do not get as many; the degrees it names suit what is `beside` these too."""
    for features in projections:
        if not features.can_be_shared_by(size):
            units = [other.heads or other.count for other in (*projections, *beside)]
            possible = [
                str(degree)
                for degree in range(1, max(units) + 1)
                if all(other.can_be_shared_by(degree) for other in (*projections, *beside))
            ]
            divides = "divides their number or is a multiple of it" if features.repeats else "divides their number"
            raise ConfigError(
                f"Got {features.heads or features.count} {features.what} of {name} over tensor_parallel_degree {size}. "
                f"Each rank takes as many, so the degree {divides}. Set tensor_parallel_degree to {one_of(possible)}."
            )


def _num_features(model: nn.Module, roles: Roles, name: str, role: str) -> int:
    weight = model.get_submodule(name)._parameters.get("weight")
    stacks = role in ("colwise", "rowwise")
    if weight is None or weight.dim() not in ((2, 3) if stacks else (2,)):
        got = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
        raise ConfigError(
            f"Got {got} in the {role} part {name}. A {role} part has a matrix named weight"
            f"{', or a stack of them' if stacks else ''}. Give the role to the projection itself."
        )
    return weight.size(features_dim(role, roles.options(name)))
