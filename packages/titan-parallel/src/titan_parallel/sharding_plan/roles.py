"""Roles of a model's modules and parameters, from a table of name patterns."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from titan_config import ConfigError
from torch import nn


@dataclass(frozen=True)
class RoleSpec:
    """The declaration of a role by the transforms that read it."""

    options: Set[str] = frozenset()
    """The options that a table may give to the role."""

    of_parameters: bool = False
    """True for roles of parameters; other roles are roles of modules."""


RoleTable = Mapping[str, str | tuple[str, Mapping[str, Any]]]
"""`{pattern: role}` or `{pattern: (role, options)}`; in a pattern `*` matches one component of a dotted name."""


@dataclass(frozen=True)
class Role:
    """The role of one module or parameter, with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Roles:
    """The roles of a model's modules and parameters, by fully qualified name.

    Raises ConfigError for an unknown role or option, a pattern without a match, two roles for one name, and roles in
    invalid places, such as a colwise module outside a region.
    """

    def __init__(self, model: nn.Module, table: RoleTable, known: Mapping[str, RoleSpec] | None = None) -> None:
        """`known` are the roles that a table may use, by name. None: the names and options of roles are not checked."""
        self._model = model
        self._roles: dict[str, Role] = {}
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        patterns: dict[str, str] = {}
        for pattern, entry in table.items():
            role = _role(pattern, entry, known)
            if known is None:
                fits = _expression(pattern).fullmatch
                of_parameters = not any(map(fits, names)) and any(map(fits, parameters))
            else:
                of_parameters = known[role.name].of_parameters
            matched = _matches(
                pattern, parameters if of_parameters else names, "parameter" if of_parameters else "module"
            )
            for name in matched:
                if name in patterns:
                    raise ConfigError(
                        f"{name} must have one role, got {self._roles[name].name} from pattern {patterns[name]!r} and "
                        f"{role.name} from pattern {pattern!r}."
                    )
                self._roles[name], patterns[name] = role, pattern
        self._roles = {
            name: self._roles[name] for name in names + parameters if name in self._roles
        }  # in the model's order
        self._check_nesting()
        self._check_stacks()

    def __str__(self) -> str:
        """Return one line for each name with a role."""
        return "\n".join(
            f"{name} {role.name} {dict(role.options) or ''}".rstrip() for name, role in self._roles.items()
        )

    def named(self, role: str) -> list[str]:
        """Return the names of all modules or parameters with this role, in the model's order."""
        return [name for name, its_role in self._roles.items() if its_role.name == role]

    def options(self, name: str) -> Mapping[str, Any]:
        """Return the options of the role of `name`."""
        return self._roles[name].options

    @property
    def head(self) -> str | None:
        """The name of the module with the role `head`, or None."""
        return next(iter(self.named("head")), None)

    @property
    def units(self) -> list[str]:
        """The names of the modules that FSDP, activation checkpointing and compilation act on: blocks and units."""
        return [name for name, role in self._roles.items() if role.name in ("block", "unit")]

    def streams_of(self, name: str) -> int:
        """Return how many of the first parameters and outputs of a block, unit or region are residual streams."""
        return int(self.options(name).get("streams", 1))

    @property
    def with_several_streams(self) -> list[str]:
        """The names of the blocks, units and regions with more than one residual stream (text and image, say)."""
        return [name for name in (*self.units, *self.named("region")) if self.streams_of(name) > 1]

    @property
    def stacks(self) -> list[str]:
        """The names of the parents of blocks. Pipeline and sequence parallelism need exactly one."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.named("block")))

    def region_of(self, name: str) -> str | None:
        """Return the name of the region that contains the module or parameter `name`, or None."""
        return next((region for region in self.named("region") if inside(name, region)), None)

    def without(self, names: Collection[str]) -> Roles:
        """Return the roles outside the modules `names`, which this rank does not hold.

        Blocks and attention cores keep their roles even inside these modules: every rank needs the index of a block in
        the stack, and models call `build_mask` of one block's core for all blocks.
        """
        roles = copy.copy(self)
        roles._roles = {
            name: role
            for name, role in self._roles.items()
            if role.name in ("block", "unit", "attention") or not any(inside(name, taken) for taken in names)
        }
        return roles

    def _check_stacks(self) -> None:
        """Raise ConfigError if the blocks of one parent are not consecutive."""
        for parent in self.stacks:
            children = list(self._model.get_submodule(parent)._modules)  # all names: a module may have several
            blocks = [name for name in self.named("block") if name.rpartition(".")[0] == parent]
            indices = sorted(children.index(name.rpartition(".")[2]) for name in blocks)
            for index, before in zip(indices[1:], indices, strict=False):
                if index != before + 1:
                    raise ConfigError(
                        f"The blocks of {parent or 'the model'} must be consecutive, got {children[before + 1]} "
                        f"between {children[before]} and {children[index]}. Give the role block to "
                        f"{children[before + 1]} too."
                    )

    def _check_nesting(self) -> None:
        if len(heads := self.named("head")) > 1:
            raise ConfigError(f"The role head must be given to one module only, got {', '.join(heads)}.")
        for role, names in (("block", self.units), ("region", self.named("region"))):
            for inner in names:
                for outer in names:
                    if inner != outer and inside(inner, outer):
                        raise ConfigError(f"A {role} must not contain another {role}, got {inner} inside {outer}.")
        for name in [name for role in ("colwise", "rowwise", "norm", "per_head") for name in self.named(role)]:
            splits = self._roles[name].name != "norm" or self.options(name)
            if splits and self.region_of(name) is None and not self.options(name).get("border"):
                raise ConfigError(
                    f"The role {self._roles[name].name} must be used inside a region, got {name} outside of one. Give "
                    f"the role region to the parent of {name}."
                )
        for region in self.named("region"):
            for role in ("colwise", "rowwise"):
                if not any(inside(name, region) for name in self.named(role)):
                    raise ConfigError(
                        f"A region must contain a colwise and a rowwise module, got {region} without {role}. Give the "
                        f"role {role} to one of its modules, or remove the role region."
                    )


def inside(name: str, parent: str) -> bool:
    """Return whether the module or parameter `name` is `parent` or is inside it."""
    return name == parent or name.startswith(parent + ".")


def _role(pattern: str, entry: str | tuple[str, Mapping[str, Any]], known: Mapping[str, RoleSpec] | None) -> Role:
    name, options = (entry, {}) if isinstance(entry, str) else entry
    if known is None:
        return Role(name, dict(options))
    if name not in known:
        raise ConfigError(
            f"The role of pattern {pattern!r} must be one of {', '.join(known)}, got {name!r}. {_nearest(name, known)}"
        )
    for option in options:
        if option not in known[name].options:
            valid = f"be among {', '.join(sorted(known[name].options))}" if known[name].options else "be empty"
            raise ConfigError(
                f"The options of the role {name} must {valid}, got {option!r} for pattern {pattern!r}. "
                f"{_nearest(option, known[name].options)}"
            )
    return Role(name, dict(options))


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


def _matches(pattern: str, names: list[str], kind: str) -> list[str]:
    expression = _expression(pattern)
    matched = [name for name in names if expression.fullmatch(name)]
    if not matched:
        known = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names)
        raise ConfigError(f"The pattern {pattern!r} must match a {kind}, got no match. {_nearest(pattern, known)}")
    return matched


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"Did you mean {close[0]!r}?" if close else "Remove it."
