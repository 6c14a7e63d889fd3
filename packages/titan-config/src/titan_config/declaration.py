"""Creation of Config classes: each becomes a dataclass, and mistakes that dataclasses silently ignore are errors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Any

from titan_config.checks import Check, compile_check
from titan_config.errors import ConfigError, label
from titan_config.tree import Node, copied

_DESCRIPTORS = (property, classmethod, staticmethod, functools.cached_property)


def declare(cls: type[Node]) -> None:
    """Make `cls` a keyword-only dataclass in place.

    Raises ConfigError for definitions that dataclasses silently ignore, such as an override without an annotation.
    """
    if "__dataclass_fields__" in cls.__dict__:
        raise ConfigError(already_a_dataclass(cls))
    annotations = inspect.get_annotations(cls)
    inherited = cls._fields
    class_vars = getattr(cls, "__dataclass_fields__", {}).keys() - inherited.keys()
    for name in annotations:
        _check_field_name(cls, name)
    for name, value in list(cls.__dict__.items()):
        if name in annotations:
            if isinstance(value, (Node, list, dict, set)):
                setattr(cls, name, dataclasses.field(default_factory=functools.partial(copied, value)))
        elif name not in class_vars and (name in inherited or not _needs_no_annotation(cls, name, value)):
            raise ConfigError(
                f"{label(cls)}.{name} must have a type annotation, got {name} = {value!r}. Write {name}: <type> = ..., "
                "also to override a default, or annotate with ClassVar[...] to declare a class variable."
            )
    dataclasses.dataclass(kw_only=True, init=False, repr=False, eq=False, match_args=False)(cls)
    cls._fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in annotations:
        if not _is_class_var(cls, name) and (name not in cls._fields or not cls._fields[name].init):
            raise ConfigError(
                f"{label(cls)}.{name} must be a plain field, got an InitVar or init=False. Compute derived values in "
                "the class that the config builds."
            )


def already_a_dataclass(cls: type) -> str:
    """Return the error message for a Config class with a dataclass decorator."""
    return (
        f"{label(cls)} must not be decorated with @dataclass: a Config class is a dataclass already, and decorating it "
        "again loses its defaults. Remove the decorator."
    )


def _check_field_name(cls: type, name: str) -> None:
    if name.startswith("_") and not _is_class_var(cls, name):
        raise ConfigError(
            f"Field names must not begin with an underscore (they are command-line flags), got {label(cls)}.{name}. "
            f"Rename the field to {name.lstrip('_')}, or annotate it with ClassVar."
        )
    for base in cls.__mro__:
        shadowed = base.__dict__.get(name)
        is_field = name in base.__dict__.get("__dataclass_fields__", {})
        if (
            isinstance(shadowed, (types.FunctionType, *_DESCRIPTORS))
            and not is_field
            and _is_method(base, name, shadowed)
        ):
            raise ConfigError(
                f"Field {label(cls)}.{name} must not have the name of the method {label(base)}.{name}. "
                "Rename the field."
            )


def _is_method(cls: type, name: str, value: Any) -> bool:
    return not isinstance(value, types.FunctionType) or value.__qualname__ == f"{cls.__qualname__}.{name}"


def _is_class_var(cls: type, name: str) -> bool:
    annotation = inspect.get_annotations(cls)[name]
    return "ClassVar" in annotation if isinstance(annotation, str) else "ClassVar" in str(annotation)


def _needs_no_annotation(cls: type, name: str, value: Any) -> bool:
    if (name.startswith("__") and name.endswith("__")) or isinstance(value, (*_DESCRIPTORS, type)):
        return True
    return isinstance(value, types.FunctionType) and value.__module__ == cls.__module__ and value.__name__ != "<lambda>"


def scope_of(frame: types.FrameType, qualname: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the globals and locals for resolving the string annotations of a class defined in `frame`.

    Python discards the locals of functions and of enclosing class bodies; `qualname` tells how many to look through.
    """
    names: dict[str, Any] = {}
    current: types.FrameType | None = frame
    for part in reversed([part for part in qualname.split(".")[:-1] if part != "<locals>"]):
        if current is None or current.f_code.co_name != part:
            break
        names = {**current.f_locals, **names}
        current = current.f_back
    return frame.f_globals, names


def annotations_of(cls: type[Node]) -> dict[str, Any]:
    """Return {field: annotation} in field order, each annotation resolved in the scope of its class."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        own = inspect.get_annotations(base)
        written = {name: own[name] for name in own if name in cls._fields and not _is_class_var(base, name)}
        if written:
            found.update(_resolved(base, written))
    return {name: found[name] for name in cls._fields}


def _resolved(cls: type, annotations: dict[str, Any]) -> dict[str, Any]:
    global_names, local_names = cls.__dict__.get("_scope", ({}, {}))
    owner = getattr(cls, "_owner", None)  # of a class in a function: its name is unbound when its Config is created
    names = {owner.__name__: owner, **local_names} if owner else local_names
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__=annotations), global_names, names)
    except NameError as error:
        raise ConfigError(
            f"Annotations of {label(cls)} must be resolvable at run time, got {error}. "
            "Import the name outside of TYPE_CHECKING."
        ) from error


def compile_field(cls: type, name: str, annotation: Any) -> Check:
    """Return the check of one field of `cls`. Raises ConfigError for an annotation of an unsupported type."""
    try:
        return compile_check(annotation)
    except TypeError as error:
        raise ConfigError(
            f"The type of {label(cls)}.{name} must be one that can be saved (number, string, path, dtype, enum, "
            "Literal, function, config, or a list, tuple, dict or set of these), got "
            f"{error}. Pass live objects to build(**runtime); annotate a component as Owner.Config."
        ) from error
