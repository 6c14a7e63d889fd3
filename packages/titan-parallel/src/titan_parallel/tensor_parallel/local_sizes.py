"""Size attributes of modules (`num_heads`, `split_size`), set to the local sizes of a tensor-parallel rank."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel.sharding_plan.roles import Roles

SIZES = ("features", "num_heads", "num_kv_heads", "num_heads_per_kv_head")
"""Quantities that an attribute may count."""


class AttributeOverride:
    """A proxy of an object that overrides some of its attributes; all others are read from the object."""

    def __init__(self, base: Any, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def set_local_sizes(model: nn.Module, roles: Roles, num_ranks: int) -> None:
    """Set the attributes in the option `set` of regions and projections, `{attribute: quantity}`, to local sizes.

    An attribute may belong to an object that the module holds, such as `config.num_attention_heads`: that module then
    sees the object with the local value, and other modules see the object unchanged. Raises ConfigError if an attribute
    is not an integer, or ranks cannot split it evenly.
    """
    for role in ("region", "colwise"):
        for name in roles.named(role):
            region = name if role == "region" else roles.region_of(name) or name
            for path, what in roles.options(name).get("set", {}).items():
                _set_local(model.get_submodule(name), name, path, what, _num_kv_heads(roles, region), num_ranks)


def _set_local(module: nn.Module, name: str, path: str, what: str, num_kv_heads: int | None, num_ranks: int) -> None:
    holder_name, _, attribute = path.rpartition(".")
    holder = getattr(module, holder_name) if holder_name else module
    size = getattr(holder, attribute, None)
    if what not in SIZES or type(size) is not int:
        known = [key for key, value in vars(holder).items() if type(value) is int]
        close = difflib.get_close_matches(attribute, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"The option set of {name} must map an integer attribute to one of {', '.join(SIZES)}, got "
            f"{{{path!r}: {what!r}}}, where {attribute} is {size!r}."
            + (f" Did you mean {close[0]!r}?" if close and close[0] != attribute else "")
        )
    local = _local_size(what, size, num_kv_heads, num_ranks)
    if local is None:
        raise ConfigError(
            f"tensor_parallel_degree must split {attribute} ({size}) of {name} evenly, got {num_ranks}. Lower the "
            f"degree, or remove {path!r} from the option set."
        )
    if holder_name:
        setattr(module, holder_name, AttributeOverride(holder, {attribute: local}))
    else:
        setattr(module, attribute, local)


def _local_size(what: str, size: int, num_kv_heads: int | None, num_ranks: int) -> int | None:
    """Return the local size, or None if ranks cannot split it evenly."""
    repeats = max(1, num_ranks // num_kv_heads) if num_kv_heads else 1
    shared_by = {"num_heads_per_kv_head": repeats, "num_kv_heads": num_ranks // repeats}.get(what, num_ranks)
    return size // shared_by if size % shared_by == 0 else None


def _num_kv_heads(roles: Roles, region: str) -> int | None:
    counts = [
        roles.options(name).get("num_kv_heads") for name in roles.named("colwise") if roles.region_of(name) == region
    ]
    return next((count for count in counts if count is not None), None)
