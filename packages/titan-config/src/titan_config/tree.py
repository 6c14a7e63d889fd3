"""The tree a config is: its nodes, walking them, copying them, replacing them.

Nodes are configs. Lists, tuples and dicts between them are part of the path: "layers.0.norm", "experts.shared".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

from titan_config.errors import ConfigError, join, label, nearest


class Node:
    """What every Config is: it holds the values of its fields, and nothing else, in its `vars`."""

    _owner: ClassVar[Any] = None
    _fields: ClassVar[dict[str, dataclasses.Field[Any]]] = {}
    _scope: ClassVar[tuple[dict[str, Any], dict[str, Any]]]
    _checks: ClassVar[dict[str, Callable[[Any], Any]]]
    _frozen = False


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        f"Got a change of {repr(list(self))[:80]}, which belongs to a built config. A built config no longer changes. "
        "Make the change before build(), or in a copy.deepcopy of the config."
    )


class FrozenList(list[Any]):
    """A list inside a built config."""

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return copied(self)

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return type(self), (list(self),)


class FrozenDict(dict[Any, Any]):
    """A dict inside a built config."""

    clear = pop = popitem = setdefault = update = _refuse
    __setitem__ = __delitem__ = __ior__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return copied(self)

    def __reduce__(self) -> tuple[type, tuple[dict[Any, Any]]]:
        return type(self), (dict(self),)


class FrozenSet(set[Any]):
    """A set inside a built config."""

    add = clear = difference_update = discard = intersection_update = pop = remove = _refuse
    symmetric_difference_update = update = __ior__ = __iand__ = __isub__ = __ixor__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> set[Any]:
        return copied(self)

    def __reduce__(self) -> tuple[type, tuple[set[Any]]]:
        return type(self), (set(self),)


def copied(value: Any, frozen: bool = False) -> Any:
    """Return a copy that shares no config, list, dict or set with the tree; `frozen`: one that no longer changes."""
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
    """Yield (name, part) for what a config or a container holds directly; nothing for any other value."""
    if isinstance(value, Node):
        held = vars(value)
        yield from ((name, held[name]) for name in value._fields if name in held)
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())


def traverse(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, config) for every config of the tree, the root ("") first, parents before their parts."""
    yield from _traverse(config, "")


def _traverse(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Node):
        yield path, value
    for name, part in children(value):
        yield from _traverse(part, join(path, name))


def same(first: Any, second: Any) -> bool:
    """Say whether two trees hold equal values of equal types; a nan equals a nan, a partial one with equal parts."""
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
    """Return a copy of `config` with the part at a path, or every config that a predicate picks, replaced.

    By path, `new` is the value: `replace(c, "model.norm.eps", 1e-6)`. By predicate, `new` is a config, or a function
    from the config that was there (a copy, whose own parts are done) to the new one:
    `replace(c, lambda node: isinstance(node, Linear.Config), lambda old: LoRA.Config(linear=old))`.
    Raises ConfigError where nothing matches.
    """
    if isinstance(where, str):
        return replaced_at(copied(config), where, copied(new))
    picked = where
    count = 0

    def change(value: Any) -> Any:
        nonlocal count
        matches = isinstance(value, Node) and picked(value)
        part = _with_parts(value, {name: change(part) for name, part in children(value)})
        if not matches:
            return part
        count += 1
        return new(part) if callable(new) else copied(new)

    result = change(copied(config))
    if not count:
        raise ConfigError(
            "Got a predicate that picks none of the configs in the tree. A replacement that changes nothing is a "
            "mistake. Look at what traverse(config) yields."
        )
    return result


def replaced_at(value: Any, path: str, new: Any) -> Any:
    """Put `new` at `path`, in place where there are configs on the way; return the root (a new one if it is none)."""
    parts = dict(children(value))
    names = value._fields if isinstance(value, Node) else parts
    matching = [name for name in names if f"{path}.".startswith(f"{name}.")]
    if not matching:
        name = path.partition(".")[0]
        raise ConfigError(f"Got the path {path}. There is no {name} in {label(type(value))}. {nearest(name, names)}")
    name = max(matching, key=len)  # the keys of a dict may hold dots
    rest = path[len(name) + 1 :]
    return _with_parts(value, {name: replaced_at(parts[name], rest, new) if rest else new})


def _with_parts(value: Any, parts: dict[str, Any]) -> Any:
    """Put `parts` in the place of those of `value`, in place where it can change, and return it."""
    if isinstance(value, Node):
        for name, part in parts.items():
            setattr(value, name, part)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(parts.get(str(index), item) for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: parts.get(str(key), item) for key, item in value.items()}
    return value
