"""`Configurable` and its `Config`: a typed config that builds the object that owns it."""

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

    A subclass without a `Config` of its own gets one, so that `B.Config()` builds a `B`.
    """

    @dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
    class Config(Node):
        """Base of all configs: a keyword-only dataclass whose every assignment is checked for name and type."""

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            declare(cls)
            cls._owner = None
            cls._scope = scope_of(sys._getframe(1), cls.__qualname__)

        def validate(self) -> None:
            """Raise ConfigError or ValueError (three sentences: got, need, do) where fields do not go together.

            Runs over the whole tree at build, saving and on the command line, after names and types were checked.
            """

        def build(self, **runtime: Any) -> Any:
            """Return the owner, made from a private frozen copy of this config and from `runtime` objects.

            Raises ConfigError, with its path in the tree, for a value of the wrong type or a `validate` that fails.
            """
            owner = _concrete_owner(type(self))
            shadowed = sorted(runtime.keys() & vars(self).keys())
            if shadowed:
                raise ConfigError(
                    f"Got {shadowed[0]} as an argument of {label(type(self))}.build(). It is a field of the "
                    f"config, and a value has one place. Set config.{shadowed[0]} instead."
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
            raise ConfigError(f"Got del of {label(type(self))}.{name}. A config has all of its fields. Set it to None.")

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
            f"Got build() of {label(config)}, which belongs to no class. Only a Config that a Configurable class holds "
            "can be built. Write it inside the class it builds, or read its fields as they are."
        )
    if getattr(owner, "__abstractmethods__", None):
        raise ConfigError(
            f"Got build() of {label(config)}, whose class is abstract. Only a class with all its methods can be built. "
            f"Use the config of a class derived from {label(owner)}."
        )
    return owner


def _adopt(owner: type[Configurable], config: Any) -> None:
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise ConfigError(
            f"Got {label(owner)}.Config = {config!r}. The Config of a Configurable derives from "
            "Configurable.Config. Write class Config(Configurable.Config) inside the class."
        )
    if list(config._fields.values()) != list(dataclasses.fields(config)):  # type: ignore[arg-type]
        raise ConfigError(already_a_dataclass(config))
    if config._owner is not None:
        raise ConfigError(
            f"Got {config.__module__}.{label(config)} as the Config of {label(owner)}. It builds "
            f"{label(config._owner)} already, and a Config has one owner. Leave the line out, or write "
            f"class Config({label(config._owner)}.Config) inside {label(owner)}."
        )
    config._owner = owner


def checks_of(cls: type[Config]) -> dict[str, Check]:
    """Return the compiled check of every field, in order; compiled when the class is first used."""
    checks: dict[str, Check] | None = cls.__dict__.get("_checks")
    if checks is None:
        checks = {name: compile_field(cls, name, annotation) for name, annotation in annotations_of(cls).items()}
        cls._checks = checks
    return checks


def _unknown(cls: type[Config], name: str) -> UnknownName:
    return UnknownName(f"Got the name {name}. {label(cls)} has no such field. {nearest(name, checks_of(cls))}")


def _wrong_type(cls: type[Config], name: str, wrong: Mismatch) -> ConfigError:
    path = join(name, wrong.path)
    return ConfigError(f"Got {describe_value(wrong.value)}. {label(cls)}.{path} must be {wrong.need}. {wrong.do}", path)


def _checked(config: Config, name: str, value: Any) -> Any:
    """Return `value` as it is stored in the field `name`, or raise ConfigError."""
    check_value = checks_of(type(config)).get(name)
    if check_value is None:
        raise _unknown(type(config), name)
    if config._frozen:
        raise ConfigError(
            f"Got {label(type(config))}.{name} = {value!r} in a built config. A built config no longer changes. "
            "Make the change before build(), or in a copy.deepcopy of the config.",
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
            f"Got {describe_value(args[0])} by position. The fields of {label(cls)} are given by name. Write "
            f"{label(cls)}({next(iter(checks_of(cls)), 'name')}=...)."
        )
    fill_whole(config, values)
    after: Callable[[Config], None] | None = getattr(cls, "__post_init__", None)
    if after is not None:
        after(config)


def fill_whole(config: Config, values: dict[str, Any]) -> None:
    """Set the fields of an empty config from `values` and defaults. Raises ConfigError where one has neither."""
    missing = fill(config, values)
    if missing:
        cls, name = label(type(config)), missing[0]
        raise ConfigError(f"Got no {name}. {cls} needs it. Write {cls}({name}=...).", name)


def fill(config: Config, values: dict[str, Any]) -> list[str]:
    """Set the fields of an empty config from `values` and defaults; return the names of those that have neither."""
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
    """Check names, types and the `validate` rules of a whole tree, parts first. Errors carry the path.

    With `finite`, numbers must be finite too, except in fields whose default is not, or whose `metadata` says so:
    `dataclasses.field(default=1.0, metadata={"finite": False})`.
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
            raise ConfigError(f"{need} Give it a number such as 0.1.", place)


def _first_not_finite(value: Any, place: str) -> tuple[str, float] | None:
    """Return the first number in a value of a field that is not finite, and its place; configs inside are not asked."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (place, value)
    if isinstance(value, Config):
        return None
    parts = (_first_not_finite(part, join(place, name)) for name, part in children(value))
    return next((part for part in parts if part), None)
