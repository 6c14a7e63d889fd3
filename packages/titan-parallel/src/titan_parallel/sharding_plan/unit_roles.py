"""Roles of any module that is only sharded over data ranks: its layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from titan_parallel.sharding_plan.roles import RoleTable


def fsdp_roles(model: nn.Module) -> RoleTable:
    """Return the table that gives the role `block` to the layers of `model`, as a plain dictionary.

    It is enough for data parallel of every shape and for recomputation, of any module. Layers are the modules with
    parts of their own in the outermost lists (`nn.ModuleList`, `nn.Sequential`) that hold two or more of them. All else
    is gathered and reduced with the root. A model without such lists has an empty table, and is one unit.
    """
    table: dict[str, str] = {}
    for name, layers in _lists("", model):
        size = len(list(model.get_submodule(name).named_children()))
        table.update(dict.fromkeys([f"{name}.*" if name else "*"] if len(layers) == size else layers, "block"))
    return table


def _lists(prefix: str, module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The outermost lists of layers below `module`: the name of each, and those of its layers."""
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    layers = [name for name, child in children if _is_layer(child)]
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(layers) > 1:
        yield prefix.rstrip("."), layers
        return
    for name, child in children:
        yield from _lists(f"{name}.", child)


def _is_layer(module: nn.Module) -> bool:
    """A module that is called, and holds others with weights. (A list is indexed, and never called.)"""
    is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    return is_called and any(any(True for _ in child.parameters()) for child in module.children())
