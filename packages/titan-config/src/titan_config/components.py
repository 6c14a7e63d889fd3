"""Choosing components on the command line: `--optimizer Muon`, `--optimizer package.muon:Muon`, `--validator None`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from titan_config.configurable import Config, fill
from titan_config.errors import ConfigError, label, nearest
from titan_config.flags import Flag, members
from titan_config.importing import find_config, path_of
from titan_config.tree import children


def known_components(types: Sequence[type[Config]]) -> dict[str, list[type[Config]]]:
    """Return {name: config classes} of all that is imported and may stand for `types`; abstract owners are left out."""
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
    """Return the flag that chooses a component with the flag `path`, and the names of those that have it."""
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
    """Return what stands for the annotated type: where that is any config, those with a base in common with `value`."""
    if annotated is not Config:
        return [annotated]
    return [base for base in type(value).__mro__ if issubclass(base, Config) and base is not Config][-1:]


def name_of(cls: type[Config]) -> str:
    """Return what a component is called on the command line: the name of the class its config builds."""
    return (cls._owner or cls).__name__


def read_components(flag: Flag, words: Sequence[str], allow: Sequence[str]) -> Any:
    """Return what the words after a flag choose: a component, None, or for a list or tuple one component a word."""
    if flag.component_types:
        if len(words) != 1:
            raise ConfigError(
                f"Got {len(words)} values for --{flag.path}. It takes the name of one component. Write --{flag.path} "
                "NAME."
            )
        return _choose(words[0], flag.component_types, flag.value, flag, allow)
    if list(words) == ["None"] and flag.is_optional:
        return None
    olds = [*(flag.value or ()), *[None] * len(words)]
    chosen = [_choose(word, flag.item_types, old, flag, allow) for word, old in zip(words, olds, strict=False)]
    return tuple(chosen) if any(get_origin(member) is tuple for member in members(flag.annotation)) else chosen


def _choose(name: str, types: Sequence[type[Config]], old: Any, flag: Flag, allow: Sequence[str]) -> Any:
    """Return the component called `name`, filled with what the shared base of it and the `old` one holds.

    Fields that neither the old component nor a default fills are left out: the command line still has to give them.
    """
    if name == "None" and flag.is_optional and flag.component_types:
        return None
    cls = find_config(name, allow) if ":" in name else _by_name(name, types, flag)
    if not issubclass(cls, tuple(types)):
        raise ConfigError(
            f"Got {name} for --{flag.path}. It must be {' or '.join(map(name_of, types))}, or derive from it. "
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
            f"Got {name} for --{flag.path}, a name of several components. One of them must be chosen. Write one of: "
            f"{paths}."
        )
    need = "It must name a component, or be an import path such as package.module:Class"
    if name == "None":
        need = f"{label(flag.owner)} cannot do without it"
    names = [*known, "None"] if flag.is_optional else list(known)
    raise ConfigError(f"Got {name} for --{flag.path}. {need}. {nearest(name, names)}")
