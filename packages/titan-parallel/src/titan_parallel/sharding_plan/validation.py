"""Checks that tensor-parallel ranks can split a model by its roles."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel.mesh.parallel_dims import ParallelDims, one_of
from titan_parallel.sharding_plan.features import Features, side_by_side
from titan_parallel.sharding_plan.roles import Roles

UNSPLITTABLE = {
    "residual": "adds the residual stream to its output, and the sum over ranks would add it once per rank",
    "alibi": "adds the position biases of all heads, but each rank has only some of the heads",
}
"""Parameters of a region's forward -> the reason why such a region cannot be split."""


def check_can_be_split(model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
    """Raise ConfigError for the first module or parameter that cannot be split, with the valid degrees."""
    size = dims.tp_size
    if not roles.named("region") and not roles.named("colwise"):
        raise ConfigError(
            f"tensor_parallel_degree must be 1 for roles without a region, got {size}. Add the roles region, colwise "
            "and rowwise to the table."
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
                    f"tensor_parallel_degree must give each rank at least one row of {name} ({rows}), got {size}."
                )


def has_ends(roles: Roles) -> bool:
    """Return whether sequence parallelism can act: an embedding, one stack of blocks with one stream, and a head."""
    one_stream = len(roles.stacks) == 1 and not roles.with_several_streams
    return one_stream and all(roles.named(role) for role in ("embedding", "head"))


def features_dim(role: str, options: Mapping[str, Any]) -> int:
    """Return the dim, counted from the end, along which a role splits the features of its matrix (or stack of them).

    Matrices are `[out, in]`, or `[in, out]` with the option `transposed`.
    """
    return -1 if (role == "rowwise") != bool(options.get("transposed")) else -2


def one_split_dim(dims: set[int | None], name: str, parameter: nn.Parameter) -> int | None:
    """Return the dim along which all owners of a (tied) parameter split it. Raises ConfigError if they differ."""
    if len(dims) > 1:
        raise ConfigError(
            f"All owners of the tied parameter {name} (shape {list(parameter.shape)}) must split it along the same "
            "dim, got different roles. Give the role embedding to one owner and head to the other."
        )
    return next(iter(dims))


def _check_region(region: nn.Module, name: str) -> None:
    parameters = inspect.signature(region.forward).parameters
    for parameter, reason in UNSPLITTABLE.items():
        if parameter in parameters:
            raise ConfigError(
                f"tensor_parallel_degree must be 1 for the region {name}, whose forward takes {parameter!r}: it "
                f"{reason}. Shard with data_parallel_shard_degree instead."
            )


def _check_colwise(model: nn.Module, roles: Roles, name: str, size: int) -> None:
    options, count = roles.options(name), _num_features(model, roles, name, "colwise")
    beside = {
        role: [n for n in roles.named(role) if _share_a_region(roles, n, name)] for role in ("colwise", "rowwise")
    }
    taken = sum(_num_features(model, roles, rowwise, "rowwise") for rowwise in beside["rowwise"])
    if "packed" not in options and count > taken > 0:
        raise ConfigError(
            f"{name} must have the option packed, got {count} output features, of which "
            f"{' and '.join(beside['rowwise'])} takes {taken}. If projections are packed side by side, set "
            '"packed" to their number (with "num_heads" and "num_kv_heads" if these differ); if they are interleaved '
            'by head, set "packed": 1 and "num_heads".'
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
            f"{name}, a single projection, must have only one of the options num_heads and num_kv_heads, got both. "
            "Remove one, or set packed to the number of packed projections."
        )
    if count % units:
        raise ConfigError(
            f"The options of {name} must divide its {count} features into equal parts, got {units} parts from "
            f"{dict(options)}."
        )
    _check_shared(size, projections, name, beside)


def _check_shared(size: int, projections: Sequence[Features], name: str, beside: Sequence[Features] = ()) -> None:
    """Raise ConfigError if `size` ranks cannot split the projections evenly.

    The message names the degrees that are valid for these and for the projections `beside` them.
    """
    for features in projections:
        if not features.can_be_shared_by(size):
            units = [other.heads or other.count for other in (*projections, *beside)]
            possible = [
                str(degree)
                for degree in range(1, max(units) + 1)
                if all(other.can_be_shared_by(degree) for other in (*projections, *beside))
            ]
            or_multiple = " or be a multiple of it" if features.repeats else ""
            raise ConfigError(
                f"tensor_parallel_degree must divide {features.what} ({features.heads or features.count}) of {name}"
                f"{or_multiple}, got {size}. Use {one_of(possible)}."
            )


def _num_features(model: nn.Module, roles: Roles, name: str, role: str) -> int:
    weight = model.get_submodule(name)._parameters.get("weight")
    stacks = role in ("colwise", "rowwise")
    if weight is None or weight.dim() not in ((2, 3) if stacks else (2,)):
        got = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
        raise ConfigError(
            f"A module with the role {role} must have a matrix{', or a stack of matrices,' if stacks else ''} named "
            f"weight, got {got} in {name}. Give the role to the projection itself."
        )
    return weight.size(features_dim(role, roles.options(name)))
