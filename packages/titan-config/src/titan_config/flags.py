"""The flags of a config: one per field of the tree, and one per item of dicts and of lists and tuples of configs."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from titan_config.configurable import Config
from titan_config.declaration import annotations_of
from titan_config.errors import join
from titan_config.tree import Node, children

UNSET: Any = object()
"""Placeholder for a required field of a component chosen on the command line, until the field is set."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A place in the tree that the command line can set: `--path`."""

    path: str
    annotation: Any
    value: Any
    owner: type[Config]
    """The config class with the field at `path`, or with the container field that holds the item at `path`."""

    @property
    def component_types(self) -> tuple[type[Config], ...]:
        """The config classes that the annotation allows (all members of a union); empty for a plain value."""
        return config_types(self.annotation) or ((Config,) if isinstance(self.value, Node) else ())

    @property
    def item_types(self) -> tuple[type[Config], ...]:
        """The config classes that the annotation allows as items of a list or tuple; empty for any other field."""
        return tuple(kind for part in members(self.annotation) for kind in config_types(_item_annotation(part, "0")))

    @property
    def is_optional(self) -> bool:
        return type(None) in members(self.annotation)

    @property
    def is_switch(self) -> bool:
        return bool in members(self.annotation)


def flags_of(config: Config) -> dict[str, Flag]:
    """Return {path: flag} for every field, and every item with a flag, in the tree below `config`."""
    return {flag.path: flag for flag in _fields(config, "")}


def _fields(config: Config, path: str) -> Iterator[Flag]:
    for name, annotation in annotations_of(type(config)).items():
        value = vars(config).get(name, UNSET)
        yield from _place(Flag(join(path, name), annotation, value, type(config)))


def _place(flag: Flag) -> Iterator[Flag]:
    yield flag
    if isinstance(flag.value, Config):
        yield from _fields(flag.value, flag.path)
    elif isinstance(flag.value, dict) or holds_config(flag.value):
        for name, part in children(flag.value):
            annotations = [_item_annotation(member, name) for member in members(flag.annotation)]
            annotation = next((one for one in annotations if one is not None), Any)
            yield from _place(Flag(join(flag.path, name), annotation, part, flag.owner))


def holds_config(value: Any) -> bool:
    """Return whether a value is a config, or a list, tuple or dict that contains one at any depth."""
    return isinstance(value, Config) or (
        isinstance(value, (list, tuple, dict)) and any(holds_config(part) for _, part in children(value))
    )


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in members(part))
    return (annotation,)


def config_types(annotation: Any) -> tuple[type[Config], ...]:
    """Return the config classes among the members of an annotation."""
    return tuple(member for member in members(annotation) if isinstance(member, type) and issubclass(member, Config))


def _item_annotation(annotation: Any, name: str) -> Any:
    """Return the annotation of the item `name` of a list, tuple or dict; None if the annotation has no items."""
    origin, args = get_origin(annotation), get_args(annotation)
    if not args or origin is collections.abc.Callable:
        return None
    if origin is tuple and args[-1] is not Ellipsis:
        return args[int(name)] if name.isdigit() and int(name) < len(args) else None
    return args[1] if origin is dict else args[0] if origin in (list, tuple) else None
