"""Blocks and units: the modules that FSDP, activation checkpointing and compilation act on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel.sharding_plan.roles import Roles


def units_of(model: nn.Module, roles: Roles) -> dict[str, nn.Module]:
    """Return `{first name: module}` of the blocks and units in order; a module with several names is listed once."""
    first_names: dict[nn.Module, str] = {}
    for name in roles.units:
        first_names.setdefault(model.get_submodule(name), name)
    return {name: module for module, name in first_names.items()}


def modules_of_several_units(model: nn.Module, roles: Roles) -> list[nn.Module]:
    """Return the outermost modules with parameters that several units share, such as the shared attention of Zamba."""
    counts = Counter(inner for unit in units_of(model, roles).values() for inner in dict.fromkeys(unit.modules()))
    shared: list[nn.Module] = []
    covered: set[nn.Module] = set()
    for module in model.modules():
        if counts[module] > 1 and module not in covered and any(True for _ in module.parameters()):
            shared.append(module)
            covered.update(module.modules())
    return shared


def check_has_units(roles: Roles, setting: str) -> None:
    """Raise ConfigError for `setting`, which acts on blocks and units, if the model has neither."""
    if not roles.units:
        raise ConfigError(
            f"{setting} must be None if no module has the role block or unit. Give the role block to the layers of the "
            "model."
        )


def check_weights_of_units(model: nn.Module, roles: Roles) -> None:
    """Raise ConfigError if a block or unit shares a weight with a different module outside of it.

    FSDP gathers each unit separately: the weight would not be gathered when the other module uses it.
    """
    blocks = roles.units
    owners: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    in_blocks = {inner for name in blocks for inner in model.get_submodule(name).modules()}
    outside = [("", name, module) for name, module in model.named_modules() if module not in in_blocks]
    inside = [(f"{name}.", *inner) for name in blocks for inner in model.get_submodule(name).named_modules()]
    for block, inner_name, module in (*outside, *inside):
        for own_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            place = f"{block}{inner_name}.{own_name}".replace("..", ".").removeprefix(".")
            owner, first = owners.setdefault(parameter, (module, place))
            if block and owner is not module and not first.startswith(block):
                raise ConfigError(
                    f"A block on several ranks must not share a weight with a different module, got {place}, which is "
                    f"also {first}. Share the module that holds the weight, or remove the role block from the layers."
                )


def with_role_errors(forward: Callable[..., Any], roles: Roles) -> Callable[..., Any]:
    """Wrap `forward` of a model to raise ConfigError if it reads a weight that is not gathered."""

    @functools.wraps(forward)
    def model_forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            names = ", ".join(name for role in ("embedding", "block", "unit", "head") for name in roles.named(role)[:2])
            raise ConfigError(
                "A weight of a module with the role embedding, block or head must be read within the forward of that "
                "module, got a model that reads one elsewhere (such as F.linear(x, embedding.weight), or a direct call "
                f"of a layer inside a block). Remove the role of that module; modules with a role: {names}, ..."
            ) from error

    return model_forward
