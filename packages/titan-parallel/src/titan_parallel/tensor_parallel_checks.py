"""Whether a model's parts can be split over the tensor axis."""

from __future__ import annotations

from titan_config import ConfigError
from torch import nn

from titan_parallel.dims import ParallelDims, one_of
from titan_parallel.roles import Roles


def check_can_be_split(model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
    """Raise ConfigError naming the first part that cannot be split, and the degrees that would do."""
    size = dims.num_tensor
    if not roles.named("region"):
        raise ConfigError(
            f"Got tensor_parallel_degree {size} and roles without a region. Tensor parallel splits the work of "
            "regions. Name the model's regions and their colwise and rowwise parts, or set tensor_parallel_degree to 1."
        )
    if dims.sequence_parallel and not (roles.named("embedding") and roles.named("head")):
        raise ConfigError(
            "Got sequence_parallel and roles without an embedding or without a head. The stream is split where it "
            "leaves the embedding and gathered where it enters the head. Name both, or set sequence_parallel to false."
        )
    for role in ("colwise", "rowwise"):
        for name in roles.named(role):
            _check_divides(size, _matrix_shape(model, name, role)[role == "rowwise"], "features", name)
    for name in roles.named("colwise"):
        for option, count in roles.options(name).items():
            _check_divides(size, count, option, name)
    for role in ("embedding", "head"):
        for name in roles.named(role):
            rows = _matrix_shape(model, name, role)[0]
            if rows <= (size - 1) * -(-rows // size):
                raise ConfigError(
                    f"Got a vocabulary of {rows} in {name} over tensor_parallel_degree {size}. Each rank holds at "
                    "least one row. Lower tensor_parallel_degree."
                )


def one_split_dim(dims: set[int | None], name: str, parameter: nn.Parameter) -> int | None:
    """The one dim in which all who share a parameter split it. Raises ConfigError where they differ."""
    if len(dims) > 1:
        raise ConfigError(
            f"Got a shared {name} of shape {list(parameter.shape)} that only some of its owners split. Tied weights "
            "are split alike. Give roles to both: embedding to the one, head to the other."
        )
    return next(iter(dims))


def _check_divides(size: int, count: int, what: str, name: str) -> None:
    if count % size:
        possible = [str(degree) for degree in range(1, count + 1) if count % degree == 0]
        raise ConfigError(
            f"Got {count} {what} of {name} over tensor_parallel_degree {size}. Each rank takes as many, so the degree "
            f"divides their number. Set tensor_parallel_degree to {one_of(possible)}."
        )


def _matrix_shape(model: nn.Module, name: str, role: str) -> tuple[int, ...]:
    weight = model.get_submodule(name)._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        got = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
        raise ConfigError(
            f"Got {got} in the {role} part {name}. A {role} part has a matrix named weight. Give the role to the "
            "projection itself."
        )
    return tuple(weight.shape)
