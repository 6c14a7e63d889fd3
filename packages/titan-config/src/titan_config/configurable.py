"""`Configurable` and its `Config`: a typed config that builds its owner class."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, dataclass_transform

from titan_config.checks import Check, Mismatch, describe_value
from titan_config.declaration import already_a_dataclass, annotations_of, compile_field, declare, scope_of
from titan_config.errors import ConfigError, UnknownName, join, label, nearest
from titan_config.tree import Node, children, copied, same


class Configurable:
    """An object built from a config: `class Config(Configurable.Config)` inside it states the fields.

    A subclass that defines no `Config` gets one automatically, so that `B.Config()` builds a `B`.
    """

    @dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
    class Config(Node):
        """Base class of all configs: a keyword-only dataclass that checks field name and type on every assignment."""

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            declare(cls)
            cls._owner = None
            cls._scope = scope_of(sys._getframe(1), cls.__qualname__)

        def validate(self) -> None:
            """Raise ConfigError or ValueError if the values of the fields are inconsistent; override in a subclass.

            Called for every config of the tree by `build`, when saving and by `cli`, after names and types are checked.
            Messages follow the pattern "X must be Y, got Z."
            """

        def build(self, **runtime: Any) -> Any:
            """Return an instance of the owner class, built from a private frozen copy of this config and `runtime`.

            `runtime` holds live objects (devices, meshes, tokenizers), passed on as keyword arguments. Raises
            ConfigError, with the path in the tree, if a value has the wrong type or `validate` fails.
            """
            owner = _concrete_owner(type(self))
            shadowed = sorted(runtime.keys() & vars(self).keys())
            if shadowed:
                raise ConfigError(
                    f"Arguments of {label(type(self))}.build() must not be fields of the config, got {shadowed[0]}. "
                    f"Set config.{shadowed[0]} instead."
                )
            if not self._frozen:
                check(self)
            return owner(copied(self, frozen=True), **runtime)

        if not TYPE_CHECKING:  # a type checker sees the fields instead

            def __init__(self, *args: Any, **values: Any) -> None:
                _initialize(self, args, values)

            def __setattr__(self, name: str, value: Any) -> None:
                vars(self)[name] = _checked(self, name, value)

            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                raise _unknown(type(self), name)

        def __delattr__(self, name: str) -> None:
            raise ConfigError(f"Field {label(type(self))}.{name} cannot be deleted. Assign None if its type allows it.")

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return copied(self)

        def __eq__(self, other: object) -> bool:
            return same(self, other)

        __hash__ = None  # type: ignore[assignment]

        def __repr__(self) -> str:
            fields = ", ".join(f"{name}={value!r}" for name, value in children(self))
            return f"{label(type(self))}({fields})"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        if config is None:
            config = cls.Config = _inherited_config(cls)  # type: ignore[misc]
        _adopt(cls, config)


Config = Configurable.Config
Config._owner = Configurable
dataclasses.dataclass(init=False, repr=False, eq=False, match_args=False)(Config)


def _inherited_config(owner: type[Configurable]) -> type[Config]:
    configs = [base.Config for base in owner.__bases__ if issubclass(base, Configurable)]
    bases = [
        config for config in configs if not any(issubclass(other, config) for other in configs if other is not config)
    ]
    namespace = {"__module__": owner.__module__, "__qualname__": f"{owner.__qualname__}.Config"}
    return types.new_class("Config", tuple(dict.fromkeys(bases)), {}, lambda body: body.update(namespace))


def _concrete_owner(config: type[Config]) -> Callable[..., Any]:
    owner: type[Configurable] | None = config._owner
    if owner is None or owner is Configurable:
        raise ConfigError(
            f"build() needs a Config that is defined inside a Configurable class, got {label(config)}. Move its "
            "definition into the class that it builds."
        )
    if getattr(owner, "__abstractmethods__", None):
        raise ConfigError(
            f"build() needs the Config of a concrete class, got {label(config)} of an abstract class. "
            f"Use the Config of a concrete subclass of {label(owner)}."
        )
    return owner


def _adopt(owner: type[Configurable], config: Any) -> None:
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise ConfigError(
            f"{label(owner)}.Config must be a subclass of Configurable.Config, got {config!r}. "
            f"Write class Config(Configurable.Config) inside {label(owner)}."
        )
    if list(config._fields.values()) != list(dataclasses.fields(config)):  # type: ignore[arg-type]
        raise ConfigError(already_a_dataclass(config))
    if config._owner is not None:
        raise ConfigError(
            f"{label(owner)}.Config must be a new class, got {config.__module__}.{label(config)}, which builds "
            f"{label(config._owner)}. Remove the assignment, or write class Config({label(config._owner)}.Config) "
            f"inside {label(owner)}."
        )
    config._owner = owner


def checks_of(cls: type[Config]) -> dict[str, Check]:
    """Return the compiled check of every field, in field order. The checks are compiled on first use of the class."""
    checks: dict[str, Check] | None = cls.__dict__.get("_checks")
    if checks is None:
        checks = {name: compile_field(cls, name, annotation) for name, annotation in annotations_of(cls).items()}
        cls._checks = checks
    return checks


def _unknown(cls: type[Config], name: str) -> UnknownName:
    return UnknownName(f"{label(cls)} has no field {name!r}. {nearest(name, checks_of(cls))}")


def _wrong_type(cls: type[Config], name: str, wrong: Mismatch) -> ConfigError:
    path = join(name, wrong.path)
    need = f"{label(cls)}.{path} must be {wrong.expected}, got {describe_value(wrong.value)}."
    return ConfigError(f"{need} {wrong.advice}".rstrip(), path)


def _checked(config: Config, name: str, value: Any) -> Any:
    """Return `value` in the form stored in the field `name`. Raises ConfigError for an unknown name or a wrong type."""
    check_value = checks_of(type(config)).get(name)
    if check_value is None:
        raise _unknown(type(config), name)
    if config._frozen:
        raise ConfigError(
            f"A built config is read-only, got {label(type(config))}.{name} = {value!r}. "
            "Change the config before build(), or change a copy.deepcopy of it.",
            name,
        )
    try:
        return check_value(value)
    except Mismatch as wrong:
        raise _wrong_type(type(config), name, wrong) from None


def _initialize(config: Config, args: tuple[Any, ...], values: dict[str, Any]) -> None:
    cls = type(config)
    if args:
        raise ConfigError(
            f"{label(cls)} takes keyword arguments only, got the positional argument {describe_value(args[0])}. "
            f"Write {label(cls)}({next(iter(checks_of(cls)), 'name')}=...)."
        )
    fill_all(config, values)
    after: Callable[[Config], None] | None = getattr(cls, "__post_init__", None)
    if after is not None:
        after(config)


def fill_all(config: Config, values: dict[str, Any]) -> None:
    """Set the fields of an empty config from `values` and defaults. Raises ConfigError if a field has neither."""
    missing = fill(config, values)
    if missing:
        cls, name = label(type(config)), missing[0]
        raise ConfigError(f"Required field {cls}.{name} is missing. Write {cls}({name}=...).", name)


def fill(config: Config, values: dict[str, Any]) -> list[str]:
    """Set the fields of an empty config from `values` and defaults. Return the names of fields that have neither."""
    cls, missing = type(config), []
    for name in values:
        if name not in checks_of(cls):
            raise _unknown(cls, name)
    for name, field in cls._fields.items():
        if name in values:
            setattr(config, name, values[name])
        elif field.default_factory is not dataclasses.MISSING:
            setattr(config, name, field.default_factory())
        elif field.default is not dataclasses.MISSING:
            setattr(config, name, field.default)
        else:
            missing.append(name)
    return missing


def check(config: Config, path: str = "", finite: bool = True) -> None:
    """Check names, types and the `validate` rules of a whole tree, nested configs first.

    Raises ConfigError with the path in the tree. With `finite`, numbers must also be finite, except in fields whose
    default is not finite or that opt out: `dataclasses.field(default=1.0, metadata={"finite": False})`.
    """
    for name, check_value in checks_of(type(config)).items():
        try:
            value = check_value(vars(config)[name])
        except Mismatch as wrong:
            error = _wrong_type(type(config), name, wrong)
            error.add_parent(path)
            raise error from None
        if not config._frozen:
            vars(config)[name] = value
    for name, part in children(config):
        _check_part(part, join(path, name), finite)
    try:
        config.validate()
        if finite:
            _check_finite(config)
    except ConfigError as error:
        error.add_parent(path)
        raise
    except ValueError as error:
        raise ConfigError(str(error), path) from error


def _check_part(value: Any, path: str, finite: bool) -> None:
    if isinstance(value, Config):
        check(value, path, finite)
    else:
        for name, part in children(value):
            _check_part(part, join(path, name), finite)


def _check_finite(config: Config) -> None:
    for name, field in config._fields.items():
        declared = field.metadata.get("finite", True) and not _first_not_finite(field.default, name)
        found = _first_not_finite(vars(config)[name], name) if declared else None
        if found:
            place, number = found
            need = f"{label(type(config))}.{place} must be a finite number, got {number}."
            raise ConfigError(need, place)


def _first_not_finite(value: Any, place: str) -> tuple[str, float] | None:
    """Return the path and value of the first non-finite number in a field's value. Nested configs are not searched."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (place, value)
    if isinstance(value, Config):
        return None
    parts = (_first_not_finite(part, join(place, name)) for name, part in children(value))
    return next((part for part in parts if part), None)
