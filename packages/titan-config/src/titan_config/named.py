"""Import paths that the user trusts: given on the command line, or of classes that the program has imported.

A config file adds no trusted path: it may use only the paths collected here.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from titan_config.configurable import Config
from titan_config.importing import find_config, path_of
from titan_config.tree import children

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.-]*:[A-Za-z_][\w.]*")


def paths_in(words: Sequence[str]) -> tuple[str, ...]:
    """Return the import paths ("module:name") among the words of a command line, including those inside JSON."""
    return tuple(path for word in words for path in _IMPORT_PATH.findall(word))


def import_components(settings: Sequence[tuple[str, list[str]]], flags: dict[str, Any], allow: Sequence[str]) -> None:
    """Import the components that a command line chooses by import path. Raises ConfigError for an invalid path."""
    for name, words in settings:
        flag = flags.get(name.replace("-", "_"))
        if flag is not None and (flag.component_types or flag.item_types):
            for word in words:
                if ":" in word:
                    find_config(word, allow)


def paths_of_program(config: Config) -> tuple[str, ...]:
    """Return the import paths of all imported Config classes, and of the values in `config` and in field defaults."""
    found = set(_paths_in_value(config))
    pending = [Config]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        found.update(_paths_in_value(cls))
        for field in cls._fields.values():
            found.update(_paths_in_value(field.default))
            if isinstance(field.default_factory, functools.partial):  # copies a mutable default
                found.update(path for value in field.default_factory.args for path in _paths_in_value(value))
    return tuple(found)


def _paths_in_value(value: Any) -> Iterator[str]:
    if isinstance(value, (Config, enum.Enum)):
        yield from _paths_in_value(type(value))
    elif isinstance(value, functools.partial):
        yield from _paths_in_value((value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, (set, frozenset)):
        yield from _paths_in_value(tuple(value))
    elif callable(value):
        path = path_of(value)
        if path is not None:
            yield path
    for _, part in children(value):
        yield from _paths_in_value(part)
