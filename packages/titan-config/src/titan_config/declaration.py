"""What happens when a Config class is made: it becomes a dataclass, and what dataclasses silently ignore is refused."""

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
    """Make `cls` a keyword-only dataclass in place, or raise ConfigError for what would not do what it seems to."""
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
                f"Got {label(cls)}.{name} = {value!r} without an annotation. A field states its type, also "
                f"where a subclass only gives it another default. Write {name}: <type> = ..., or ClassVar[...] for "
                "what is no field."
            )
    dataclasses.dataclass(kw_only=True, init=False, repr=False, eq=False, match_args=False)(cls)
    cls._fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in annotations:
        if not _is_class_var(cls, name) and (name not in cls._fields or not cls._fields[name].init):
            raise ConfigError(
                f"Got {label(cls)}.{name} as an InitVar or with init=False. A config is finished data: what it "
                "is given is what it holds. Write a plain field, and derive the value where the owner is built."
            )


def already_a_dataclass(cls: type) -> str:
    """Return what is said about a Config class with a dataclass decorator."""
    return (
        f"Got @dataclass on {label(cls)}. A Config class becomes a keyword-only dataclass by itself, and a "
        "second time loses its defaults. Remove the decorator."
    )


def _check_field_name(cls: type, name: str) -> None:
    if name.startswith("_") and not _is_class_var(cls, name):
        raise ConfigError(
            f"Got a field {label(cls)}.{name}. Names of fields do not begin with an underscore: they are flags "
            f"on the command line. Call it {name.lstrip('_')}, or annotate it as ClassVar."
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
                f"Got a field {label(cls)}.{name}. {label(base)}.{name} is a method, which the field "
                "would hide. Give the field another name."
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
    """Return the globals and locals in which a class made in `frame` reads annotations that are strings.

    Python forgets the locals of functions and of enclosing class bodies; `qualname` says how many of these there are.
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
    """Return {field: annotation} in the order of the fields, each resolved where it was written."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        own = inspect.get_annotations(base)
        written = {name: own[name] for name in own if name in cls._fields and not _is_class_var(base, name)}
        if written:
            found.update(_resolved(base, written))
    return {name: found[name] for name in cls._fields}


def _resolved(cls: type, annotations: dict[str, Any]) -> dict[str, Any]:
    global_names, local_names = cls.__dict__.get("_scope", ({}, {}))
    owner = getattr(cls, "_owner", None)  # in a function, its own name is not known yet when the Config is made
    names = {owner.__name__: owner, **local_names} if owner else local_names
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__=annotations), global_names, names)
    except NameError as error:
        raise ConfigError(
            f"Got an annotation in {label(cls)} that cannot be read: {error}. Annotations of fields are read "
            "when the program runs. Import the name outside of TYPE_CHECKING."
        ) from error


def compile_field(cls: type, name: str, annotation: Any) -> Check:
    """Return the check of one field of `cls`."""
    try:
        return compile_check(annotation)
    except TypeError as error:
        raise ConfigError(
            f"Got the annotation {error} for {label(cls)}.{name}. A field holds what can be saved: numbers, "
            "strings, paths, dtypes, enums, Literals, functions, configs, and lists, tuples, dicts and sets of "
            "these. Choose one of them: objects enter through build(**runtime), an owner as Owner.Config."
        ) from None
