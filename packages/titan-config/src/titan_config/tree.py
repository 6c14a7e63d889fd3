"""The config tree: traverse, copy and replace its nodes.

Nodes are configs. Lists, tuples and dicts between nodes are part of the path: "layers.0.norm", "experts.shared".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

from titan_config.errors import ConfigError, join, label, nearest


class Node:
    """Base class of every Config: its `vars` hold the values of its fields and nothing else."""

    _owner: ClassVar[Any] = None
    _fields: ClassVar[dict[str, dataclasses.Field[Any]]] = {}
    _scope: ClassVar[tuple[dict[str, Any], dict[str, Any]]]
    _checks: ClassVar[dict[str, Callable[[Any], Any]]]
    _frozen = False


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        f"A built config is read-only, got a change of {repr(list(self))[:80]}. "
        "Change the config before build(), or change a copy.deepcopy of it."
    )


class FrozenList(list[Any]):
    """A read-only list inside a built config."""

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return copied(self)

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return type(self), (list(self),)


class FrozenDict(dict[Any, Any]):
    """A read-only dict inside a built config."""

    clear = pop = popitem = setdefault = update = _refuse
    __setitem__ = __delitem__ = __ior__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return copied(self)

    def __reduce__(self) -> tuple[type, tuple[dict[Any, Any]]]:
        return type(self), (dict(self),)


class FrozenSet(set[Any]):
    """A read-only set inside a built config."""

    add = clear = difference_update = discard = intersection_update = pop = remove = _refuse
    symmetric_difference_update = update = __ior__ = __iand__ = __isub__ = __ixor__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> set[Any]:
        return copied(self)

    def __reduce__(self) -> tuple[type, tuple[set[Any]]]:
        return type(self), (set(self),)


def copied(value: Any, frozen: bool = False) -> Any:
    """Return a copy that shares no config, list, dict or set with `value`; a read-only one if `frozen`."""
    if isinstance(value, Node):
        if frozen and value._frozen:
            return value
        new = object.__new__(type(value))
        new.__dict__.update((name, copied(item, frozen)) for name, item in children(value))
        if frozen:
            new.__dict__["_frozen"] = True
        return new
    if isinstance(value, list):
        return (FrozenList if frozen else list)(copied(item, frozen) for item in value)
    if type(value) is tuple:
        return tuple(copied(item, frozen) for item in value)
    if isinstance(value, dict):
        return (FrozenDict if frozen else dict)((key, copied(item, frozen)) for key, item in value.items())
    if isinstance(value, set):
        return (FrozenSet if frozen else set)(value)
    return value


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, child) for the direct children of a config or a container; nothing for any other value."""
    if isinstance(value, Node):
        held = vars(value)
        yield from ((name, held[name]) for name in value._fields if name in held)
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())


def traverse(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, config) for every config of the tree, the root ("") first, parents before children."""
    yield from _traverse(config, "")


def _traverse(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Node):
        yield path, value
    for name, part in children(value):
        yield from _traverse(part, join(path, name))


def same(first: Any, second: Any) -> bool:
    """Return whether two trees hold equal values of equal types.

    NaN equals NaN, and two partials are equal if their functions and arguments are.
    """
    if _kind(first) is not _kind(second):
        return False
    if isinstance(first, functools.partial):
        return same((first.func, first.args, first.keywords), (second.func, second.args, second.keywords))
    if isinstance(first, (Node, list, tuple, dict)):
        one, two = _parts_by_key(first), _parts_by_key(second)
        return one.keys() == two.keys() and all(same(part, two[name]) for name, part in one.items())
    return bool(first == second) or (first != first and second != second)


def _parts_by_key(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return {(type(key), key): part for key, part in value.items()}
    return dict(children(value))


def _kind(value: Any) -> type:
    return next((kind for kind in (list, dict, set) if isinstance(value, kind)), type(value))


def replace(config: Any, where: str | Callable[[Any], bool], new: Any) -> Any:
    """Return a copy of `config` in which the value at a path, or every config that matches a predicate, is replaced.

    If `where` is a path, `new` is the value: `replace(c, "model.norm.eps", 1e-6)`. If `where` is a predicate, `new` is
    a config, or a function from the old config (a copy, with replacements inside it already made) to the new one:
    `replace(c, lambda node: isinstance(node, Linear.Config), lambda old: LoRA.Config(linear=old))`.
    Raises ConfigError if nothing matches.
    """
    if isinstance(where, str):
        return replaced_at(copied(config), where, copied(new))
    predicate = where
    count = 0

    def change(value: Any) -> Any:
        nonlocal count
        matches = isinstance(value, Node) and predicate(value)
        part = _with_parts(value, {name: change(part) for name, part in children(value)})
        if not matches:
            return part
        count += 1
        return new(part) if callable(new) else copied(new)

    result = change(copied(config))
    if not count:
        raise ConfigError(
            "The predicate must match at least one config of the tree, got no match. "
            "traverse(config) yields all configs of the tree."
        )
    return result


def replaced_at(value: Any, path: str, new: Any) -> Any:
    """Set the value at `path` to `new` and return the root. Configs on the path change in place; containers are copied.

    Raises ConfigError for a path that does not exist.
    """
    parts = dict(children(value))
    names = value._fields if isinstance(value, Node) else parts
    matching = [name for name in names if f"{path}.".startswith(f"{name}.")]
    if not matching:
        name = path.partition(".")[0]
        raise ConfigError(f"{label(type(value))} has no {name!r} (path {path}). {nearest(name, names)}")
    name = max(matching, key=len)  # keys of a dict may contain dots
    rest = path[len(name) + 1 :]
    return _with_parts(value, {name: replaced_at(parts[name], rest, new) if rest else new})


def _with_parts(value: Any, parts: dict[str, Any]) -> Any:
    """Return `value` with the children in `parts` replaced: a config is changed in place, a container is copied."""
    if isinstance(value, Node):
        for name, part in parts.items():
            setattr(value, name, part)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(parts.get(str(index), item) for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: parts.get(str(key), item) for key, item in value.items()}
    return value
