"""Roles: what each part of a model is, from a table of patterns."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_config import ConfigError
from torch import nn

OPTIONS: dict[str, frozenset[str]] = {
    "embedding": frozenset({"between_blocks"}),
    "block": frozenset(),
    "region": frozenset({"set"}),
    "colwise": frozenset({"num_heads", "num_kv_heads", "packed", "transposed", "border", "set"}),
    "rowwise": frozenset({"transposed", "border"}),
    "attention": frozenset(),
    "norm": frozenset({"num_heads", "num_kv_heads"}),
    "per_head": frozenset(),
    "step_counter": frozenset(),
    "auxiliary_loss": frozenset(),
    "head": frozenset({"takes_loss"}),
}
"""Every role and the options it takes; docs/parallel.md says what each is."""

OF_PARAMETERS = frozenset({"per_head"})
"""Roles of parameters; all others are of modules."""

RoleTable = Mapping[str, str | tuple[str, Mapping[str, Any]]]
"""`{pattern: role}` or `{pattern: (role, options)}`; in a pattern `*` is one part of a name."""


@dataclass(frozen=True)
class Role:
    """What one part is."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Roles:
    """The roles of a model's modules and parameters, by fully qualified name.

    Raises ConfigError for an unknown role or option, a pattern that matches nothing, a part with two roles, and parts
    that lie where they have no meaning.
    """

    def __init__(self, model: nn.Module, table: RoleTable) -> None:
        self._model = model
        self._roles: dict[str, Role] = {}
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        patterns: dict[str, str] = {}
        for pattern, entry in table.items():
            role = _role(pattern, entry)
            matched = (
                _matches(pattern, parameters, "parameter")
                if role.name in OF_PARAMETERS
                else _matches(pattern, names, "module")
            )
            for name in matched:
                if name in patterns:
                    raise ConfigError(
                        f"Got two roles for {name}: {self._roles[name].name} from {patterns[name]!r} and {role.name} "
                        f"from {pattern!r}. A part is one thing. Narrow one of the patterns."
                    )
                self._roles[name], patterns[name] = role, pattern
        self._roles = {
            name: self._roles[name] for name in names + parameters if name in self._roles
        }  # in the model's order
        self._check_nesting()
        self._check_stacks()

    def __str__(self) -> str:
        """A line for each module that has a role."""
        return "\n".join(
            f"{name} {role.name} {dict(role.options) or ''}".rstrip() for name, role in self._roles.items()
        )

    def named(self, role: str) -> list[str]:
        """The names of all parts with this role, in the model's order."""
        return [name for name, its_role in self._roles.items() if its_role.name == role]

    def options(self, name: str) -> Mapping[str, Any]:
        """The options that the table gives to a part's role."""
        return self._roles[name].options

    @property
    def head(self) -> str | None:
        """The name of the head, if the table names one."""
        return next(iter(self.named("head")), None)

    @property
    def stacks(self) -> list[str]:
        """The names of the modules that hold blocks. Pipelines and sequence parallel follow the stream of one."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.named("block")))

    def region_of(self, name: str) -> str | None:
        """The region that a module or parameter lies in."""
        return next((region for region in self.named("region") if inside(name, region)), None)

    def without(self, names: Collection[str]) -> Roles:
        """The roles of what is not in the modules `names`, which a rank does not hold.

        Blocks and attention cores keep theirs, whoever holds them: the place of a block in the stack counts on every
        rank, and models ask the core of one block for the mask of all.
        """
        roles = copy.copy(self)
        roles._roles = {
            name: role
            for name, role in self._roles.items()
            if role.name in ("block", "attention") or not any(inside(name, taken) for taken in names)
        }
        return roles

    def _check_stacks(self) -> None:
        """Blocks of one list are neighbors: what runs before them and after them is not theirs."""
        for parent in self.stacks:
            children = list(self._model.get_submodule(parent)._modules)  # by all names: one may stand in several places
            blocks = [name for name in self.named("block") if name.rpartition(".")[0] == parent]
            indices = sorted(children.index(name.rpartition(".")[2]) for name in blocks)
            for index, before in zip(indices[1:], indices, strict=False):
                if index != before + 1:
                    raise ConfigError(
                        f"Got blocks in {parent or 'the model'} with {children[before + 1]} between {children[before]} "
                        f"and {children[index]}. Blocks are one stack: the stream passes through them one after the "
                        f"other. Give the role block to {children[before + 1]} too, or to neighbors only."
                    )

    def _check_nesting(self) -> None:
        if len(heads := self.named("head")) > 1:
            raise ConfigError(
                f"Got the role head for {', '.join(heads)}. A model has one output. Give the role to one of them."
            )
        for role in ("block", "region"):
            for inner in self.named(role):
                for outer in self.named(role):
                    if inner != outer and inside(inner, outer):
                        raise ConfigError(
                            f"Got the {role} {inner} inside the {role} {outer}. A {role} holds no other. "
                            "Give the role to one of them."
                        )
        for name in [name for role in ("colwise", "rowwise", "norm", "per_head") for name in self.named(role)]:
            splits = self._roles[name].name != "norm" or self.options(name)
            if splits and self.region_of(name) is None and not self.options(name).get("border"):
                raise ConfigError(
                    f"Got the {self._roles[name].name} part {name} in no region. What is split is gathered and summed "
                    f"at the border of a region. Give the role region to the parent of {name}."
                )
        for region in self.named("region"):
            for role in ("colwise", "rowwise"):
                if not any(inside(name, region) for name in self.named(role)):
                    raise ConfigError(
                        f"Got the region {region} without a {role} part. A region splits features (colwise) and sums "
                        f"over them (rowwise). Name its {role} part, or take the role region away."
                    )


def inside(name: str, parent: str) -> bool:
    """Whether a module or parameter is `parent` or lies in it."""
    return name == parent or name.startswith(parent + ".")


def _role(pattern: str, entry: str | tuple[str, Mapping[str, Any]]) -> Role:
    name, options = (entry, {}) if isinstance(entry, str) else entry
    if name not in OPTIONS:
        raise ConfigError(
            f"Got the unknown role {name!r} for {pattern!r}. Roles are {', '.join(OPTIONS)}. {_nearest(name, OPTIONS)}"
        )
    for option in options:
        if option not in OPTIONS[name]:
            takes = ", ".join(sorted(OPTIONS[name])) or "none"
            raise ConfigError(
                f"Got the unknown option {option!r} of the role {name} for {pattern!r}. Its options: {takes}. "
                f"{_nearest(option, OPTIONS[name])}"
            )
    return Role(name, dict(options))


def _matches(pattern: str, names: list[str], kind: str) -> list[str]:
    expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    matched = [name for name in names if expression.fullmatch(name)]
    if not matched:
        known = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names)
        raise ConfigError(
            f"Got the pattern {pattern!r}, which matches no {kind}. A pattern names parts of the model. "
            f"{_nearest(pattern, known)}"
        )
    return matched


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"Did you mean {close[0]!r}?" if close else "Take it away."
