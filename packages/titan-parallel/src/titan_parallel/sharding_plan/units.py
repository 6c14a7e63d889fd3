"""FSDP units of shared modules and weights."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel.sharding_plan.roles import Roles


def blocks_of(model: nn.Module, roles: Roles) -> list[nn.Module]:
    """The blocks in order, each once, also where one stands in several places."""
    return list(dict.fromkeys(model.get_submodule(name) for name in roles.named("block")))


def modules_of_several_blocks(model: nn.Module, roles: Roles) -> list[nn.Module]:
    """The largest modules with parameters that several blocks hold, as Zamba's shared attention."""
    counts = Counter(inner for block in blocks_of(model, roles) for inner in dict.fromkeys(block.modules()))
    shared: list[nn.Module] = []
    covered: set[nn.Module] = set()
    for module in model.modules():
        if counts[module] > 1 and module not in covered and any(True for _ in module.parameters()):
            shared.append(module)
            covered.update(module.modules())
    return shared


def check_weights_of_blocks(model: nn.Module, roles: Roles) -> None:
    """Raise ConfigError where a block shares a weight of different modules: each block is gathered by itself."""
    blocks = roles.named("block")
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
                    f"Blocks on several ranks must have weights of their own, got {place}, which is also {first}. "
                    "Let them share the module that holds it, or remove the role block from the layers."
                )


def with_role_errors(forward: Callable[..., Any], roles: Roles) -> Callable[..., Any]:
    """`forward` of a model, with a sentence for a weight that is read while it is not gathered."""

    @functools.wraps(forward)
    def model_forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            names = ", ".join(name for role in ("embedding", "block", "head") for name in roles.named(role)[:2])
            raise ConfigError(
                "A weight of a part with the role embedding, block or head must be read within the forward of that "
                "part, got a model that reads one from outside (such as F.linear(x, embedding.weight), or a call of a "
                f"layer inside a block). Remove the role of that part; these have one: {names}, ..."
            ) from error

    return model_forward
