"""Component selection on the command line: `--optimizer Muon`, `--optimizer package.muon:Muon`, `--validator None`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from titan_config.configurable import Config, fill
from titan_config.errors import ConfigError, label, nearest
from titan_config.flags import Flag, members
from titan_config.importing import find_config, path_of
from titan_config.tree import children


def known_components(types: Sequence[type[Config]]) -> dict[str, list[type[Config]]]:
    """Return {name: config classes} of all imported subclasses of `types`, without those of abstract owners."""
    found: dict[str, dict[str, type[Config]]] = {}
    for cls in (cls for kind in types for cls in _with_subclasses(kind)):
        if cls is not Config and not getattr(cls._owner, "__abstractmethods__", None):
            found.setdefault(name_of(cls), {})[f"{cls.__module__}:{cls.__qualname__}"] = cls
    return {name: list(classes.values()) for name, classes in sorted(found.items())}


def _with_subclasses(cls: type[Config]) -> Iterator[type[Config]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def components_with(path: str, flags: dict[str, Flag]) -> tuple[str, list[str]] | None:
    """Return the component flag above `path` and the names of up to three components that have the flag `path`.

    None if no imported component has it.
    """
    place = path
    while "." in place:
        place = place.rpartition(".")[0]
        flag = flags.get(place)
        types = (flag.component_types or flag.item_types) if flag else ()
        if flag and types:
            types = tuple(kind for annotated in types for kind in _related(annotated, flag.value))
            rest = path[len(place) + 1 :].split(".")
            field = rest[0] if flag.component_types or len(rest) == 1 else rest[1]
            known = known_components(types)
            names = [name for name, classes in known.items() if any(field in cls._fields for cls in classes)]
            return (place, names[:3]) if names else None
    return None


def _related(annotated: type[Config], value: Any) -> list[type[Config]]:
    """Return the base class of the candidates for a field: `annotated`, or the root class of `value` for any config."""
    if annotated is not Config:
        return [annotated]
    return [base for base in type(value).__mro__ if issubclass(base, Config) and base is not Config][-1:]


def name_of(cls: type[Config]) -> str:
    """Return the name of a component on the command line: the name of the class that its config builds."""
    return (cls._owner or cls).__name__


def read_components(flag: Flag, words: Sequence[str], allow: Sequence[str]) -> Any:
    """Return the value that the words after a flag select.

    That is a component, None, or, for a field that is a list or tuple, one component per word. Raises ConfigError for
    an unknown or unsuitable component.
    """
    if flag.component_types:
        if len(words) != 1:
            raise ConfigError(f"--{flag.path} must be followed by the name of one component, got {len(words)} values.")
        return _choose(words[0], flag.component_types, flag.value, flag, allow)
    if list(words) == ["None"] and flag.is_optional:
        return None
    olds = [*(flag.value or ()), *[None] * len(words)]
    chosen = [_choose(word, flag.item_types, old, flag, allow) for word, old in zip(words, olds, strict=False)]
    return tuple(chosen) if any(get_origin(member) is tuple for member in members(flag.annotation)) else chosen


def _choose(name: str, types: Sequence[type[Config]], old: Any, flag: Flag, allow: Sequence[str]) -> Any:
    """Return the component called `name`, with the fields of its common base class with `old` copied from `old`.

    Fields that have neither an old value nor a default are left unset: the command line must set them.
    """
    if name == "None" and flag.is_optional and flag.component_types:
        return None
    cls = find_config(name, allow) if ":" in name else _by_name(name, types, flag)
    if not issubclass(cls, tuple(types)):
        raise ConfigError(
            f"--{flag.path} must be {' or '.join(map(name_of, types))} or a subclass, got {name}. "
            f"{nearest(name, known_components(types))}"
        )
    if type(old) is cls:
        return old
    values = _shared_values(old, cls) if isinstance(old, Config) else {}
    new = object.__new__(cls)
    return new if fill(new, values) else cls(**values)


def _shared_values(old: Config, cls: type[Config]) -> dict[str, Any]:
    shared = next(base for base in type(old).__mro__ if issubclass(base, Config) and issubclass(cls, base))
    return {name: value for name, value in children(old) if name in shared._fields}


def _by_name(name: str, types: Sequence[type[Config]], flag: Flag) -> type[Config]:
    known = known_components(types)
    candidates = known.get(name, [])
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        paths = ", ".join(str(path_of(cls._owner or cls)) for cls in candidates)
        raise ConfigError(
            f"--{flag.path} must name exactly one component, got {name}, the name of {len(candidates)} components. "
            f"Write one of: {paths}."
        )
    need = "must be the name of a component or an import path such as package.module:Class"
    if name == "None":
        need = f"must be a component (the field of {label(flag.owner)} is not optional)"
    names = [*known, "None"] if flag.is_optional else list(known)
    raise ConfigError(f"--{flag.path} {need}, got {name}. {nearest(name, names)}")
