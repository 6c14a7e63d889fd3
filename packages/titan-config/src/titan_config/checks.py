"""Checks of values against annotations, compiled once per field.

`compile_check(annotation)(value)` returns the value to store: `value` itself, or its converted form (an int given for a
float becomes a float). It raises Mismatch for a value of another type.
"""

from __future__ import annotations

import collections.abc
import enum
import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from titan_config.errors import join, label
from titan_config.local_path import as_written, remote_advice, scheme_of
from titan_config.tree import Node

Check = Callable[[Any], Any]


class Mismatch(Exception):
    """A value that does not match its annotation; `path` is the item inside a container, `advice` the fix or ""."""

    def __init__(self, value: Any, expected: str, advice: str = "", path: str = "") -> None:
        super().__init__(value, expected, advice, path)
        self.value, self.expected, self.advice, self.path = value, expected, advice, path


class RemotePath(Mismatch):
    """A path with a scheme, which is an error even where another member of a union would accept the value."""


def is_callable(annotation: Any) -> bool:
    """Return whether an annotation is `Callable`, with or without arguments."""
    return get_origin(annotation) is collections.abc.Callable or annotation in (Callable, typing.Callable)


def is_dtype(annotation: Any) -> bool:
    """Return whether an annotation is `torch.dtype`, without importing torch."""
    return isinstance(annotation, type) and (annotation.__module__, annotation.__name__) == ("torch", "dtype")


def describe(annotation: Any) -> str:
    """Return an annotation as readable text: "list[int]", "Norm.Config or None", "one of 'full', 'none'"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Any:
        return "anything"
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if is_callable(annotation):
        return "a function"
    if origin is not None:
        inner = ", ".join("..." if arg is Ellipsis else describe(arg) for arg in args)
        return f"{describe(origin)}[{inner}]"
    if isinstance(annotation, type):
        return "torch.dtype" if is_dtype(annotation) else label(annotation)
    return str(annotation)


def describe_value(value: Any) -> str:
    """Return a value, cut to 80 characters, and its type as one line; a path with a scheme as the user wrote it."""
    if isinstance(value, os.PathLike) and scheme_of(value):
        return as_written(value)
    try:
        text = repr(value)
    except ValueError:  # Python limits the conversion of integers to 4300 digits
        text = f"{value:#x}" if isinstance(value, int) else "..."
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if value is None or isinstance(value, type) else f"{text} ({label(type(value))})"


def compile_check(annotation: Any) -> Check:
    """Return the check for `annotation`. Raises TypeError for an annotation that a config field cannot have."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return lambda value: value
    if annotation is None:
        return _instance_check(type(None))
    if origin is Literal:
        return _literal_check(annotation, args)
    if origin in (Union, types.UnionType):
        takes_paths = any(isinstance(arg, type) and issubclass(arg, os.PathLike) for arg in args)
        return _union_check(
            annotation, [_path_check(_check_str) if arg is str and takes_paths else compile_check(arg) for arg in args]
        )
    if is_callable(annotation):
        return _callable_check
    container = origin or annotation
    if container is dict:
        return _dict_check(*(compile_check(arg) for arg in args or (Any, Any)))
    if container is tuple and args and args[-1] is not Ellipsis:
        return _fixed_tuple_check(annotation, [compile_check(arg) for arg in args if arg != ()])
    if container in (list, tuple, set, frozenset):
        return _items_check(container, annotation, compile_check(args[0] if args else Any))
    if origin is not None or not isinstance(annotation, type):
        raise TypeError(describe(annotation))
    if annotation in (bool, int, float, str):
        return {bool: _instance_check(bool), int: _check_int, float: _check_float, str: _check_str}[annotation]
    if issubclass(annotation, os.PathLike):
        return _path_check(_instance_check(annotation))
    if annotation is type(None) or issubclass(annotation, enum.Enum) or is_dtype(annotation):
        return _instance_check(annotation)
    if issubclass(annotation, Node):
        return _instance_check(annotation)
    raise TypeError(describe(annotation))


def _check_int(value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise Mismatch(value, "int", _number_advice(value, int))


def _check_float(value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Mismatch(value, "float", "The largest float is 1.8e308.") from None
    raise Mismatch(value, "float", _number_advice(value, float))


def _number_advice(value: Any, kind: type) -> str:
    if isinstance(value, str):
        try:
            kind(value)
            return f"Write {value.strip()} without quotes."
        except ValueError:
            pass
    if isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    return ""


def _check_str(value: Any) -> str:
    if type(value) is str:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    raise Mismatch(value, "str", f'Write "{value}" with quotes.')


def _instance_check(kind: type) -> Check:
    def check(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        raise Mismatch(value, describe(kind), _instance_advice(value, kind))

    return check


def _instance_advice(value: Any, kind: type) -> str:
    if kind is bool:
        return "Write True or False."
    if issubclass(kind, enum.Enum):
        return f"Use one of: {', '.join(f'{kind.__name__}.{member.name}' for member in kind)}."
    if issubclass(kind, os.PathLike):
        return f'Write Path("{os.fspath(value) if isinstance(value, (str, os.PathLike)) else "..."}").'
    if is_dtype(kind):
        return f"Write torch.{value}." if isinstance(value, str) and value.isidentifier() else "Write torch.bfloat16."
    if kind is type(None):
        return ""
    if isinstance(value, type) and hasattr(value, "Config"):
        return f"Write {label(value)}.Config(...)."
    return f"Write {label(kind)}(...) or the Config of a subclass."


def _path_check(check_type: Check) -> Check:
    def check(value: Any) -> Any:
        path = check_type(value)
        scheme = scheme_of(path)
        if scheme:
            raise RemotePath(value, "a local path", remote_advice(scheme))
        return path

    return check


def _literal_check(annotation: Any, choices: tuple[Any, ...]) -> Check:
    def check(value: Any) -> Any:
        for choice in choices:
            if value == choice and type(value) is type(choice):
                return value
        raise Mismatch(value, describe(annotation))

    return check


def _union_check(annotation: Any, checks: list[Check]) -> Check:
    def check(value: Any) -> Any:
        stored: list[Any] = []
        failures: list[Mismatch] = []
        for member in checks:
            try:
                result = member(value)
            except RemotePath:
                raise
            except Mismatch as mismatch:
                failures.append(mismatch)
                continue
            if result is value:  # an exact match is preferred to one that converts
                return value
            stored.append(result)
        if stored:
            return stored[0]
        inside = [mismatch for mismatch in failures if mismatch.path]
        if len(inside) == 1:  # the container matches, one of its items does not
            raise inside[0]
        raise Mismatch(value, describe(annotation), failures[0].advice)

    return check


def _callable_check(value: Any) -> Any:
    if callable(value):
        return value
    raise Mismatch(value, "a function", "Pass the function itself or a functools.partial of it.")


def _items_check(container: Any, annotation: Any, check_item: Check) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, container):
            raise Mismatch(value, describe(annotation), _container_advice(value, container))
        items = [_checked_item(check_item, item, index) for index, item in enumerate(value)]
        return value if all(map(_same, items, value)) else container(items)

    return check


def _fixed_tuple_check(annotation: Any, checks: list[Check]) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, tuple):
            raise Mismatch(value, describe(annotation), _container_advice(value, tuple))
        if len(value) != len(checks):
            raise Mismatch(value, describe(annotation), f"The tuple must have {len(checks)} items.")
        items = [_checked_item(checks[index], item, index) for index, item in enumerate(value)]
        return value if all(map(_same, items, value)) else tuple(items)

    return check


def _dict_check(check_key: Check, check_value: Check) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise Mismatch(value, "dict", "Write {key: value}.")
        items = {
            _checked_item(check_key, key, key): _checked_item(check_value, item, key) for key, item in value.items()
        }
        return value if all(map(_same, items.values(), value.values())) else items

    return check


def _same(first: Any, second: Any) -> bool:
    return first is second


def _checked_item(check: Check, item: Any, place: object) -> Any:
    try:
        return check(item)
    except Mismatch as mismatch:
        path = join(str(place), mismatch.path)
        raise Mismatch(mismatch.value, mismatch.expected, mismatch.advice, path) from None


def _container_advice(value: Any, container: Any) -> str:
    kinds = (list, tuple, set, frozenset)
    if isinstance(value, kinds):
        return f"Write {container(value)!r}."
    return f"Write {container([value])!r}." if isinstance(value, (str, int, float)) else ""
