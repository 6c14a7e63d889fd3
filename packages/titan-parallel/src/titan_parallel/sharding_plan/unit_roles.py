"""Roles for models that are only sharded over data-parallel ranks: the layers of any `nn.Module`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from titan_parallel.sharding_plan.roles import RoleTable


def fsdp_roles(model: nn.Module) -> RoleTable:
    """Return a table of roles, a plain dictionary, that gives the role `block` to the layers of `model`.

    It is enough for FSDP, HSDP and DDP and for activation checkpointing of any module. The outermost lists
    (`nn.ModuleList`, `nn.Sequential`) with two or more layers count; a layer is a child of such a list that has
    submodules with parameters. All other parameters belong to the root FSDP unit. For a model without such lists the
    table is empty, and the model is one unit.
    """
    table: dict[str, str] = {}
    for name, layers in _lists("", model):
        size = len(list(model.get_submodule(name).named_children()))
        table.update(dict.fromkeys([f"{name}.*" if name else "*"] if len(layers) == size else layers, "block"))
    return table


def _lists(prefix: str, module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield the outermost lists of layers below `module`: the name of each, and the names of its layers."""
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    layers = [name for name, child in children if _is_layer(child)]
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(layers) > 1:
        yield prefix.rstrip("."), layers
        return
    for name, child in children:
        yield from _lists(f"{name}.", child)


def _is_layer(module: nn.Module) -> bool:
    """Return whether `module` can be called (containers cannot) and has children with parameters."""
    is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    return is_called and any(any(True for _ in child.parameters()) for child in module.children())
