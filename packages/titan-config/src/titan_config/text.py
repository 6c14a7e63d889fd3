"""Readable configs: sorted `path: value` text for golden files, and the difference between two configs.

Both work on plain data, so two saved runs can be compared without their code being installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from titan_config.codec import encode
from titan_config.configurable import Config
from titan_config.errors import join
from titan_config.files import read_json

ABSENT = "(absent)"


class Name(str):
    """Text printed without quotes: the import path of a class or function, a dtype, a folder."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Change(NamedTuple):
    """A difference between two configs; `old` or `new` is "(absent)" if only the other config has the path."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


def to_text(config: Config | dict[str, Any]) -> str:
    """Return a config or its data as sorted `path: value` lines: one per field and one per config for its class."""
    return "".join(f"{path or '$type'}: {value!r}\n" for path, value in sorted(flatten(config).items()))


def diff(
    old: Config | dict[str, Any] | str | os.PathLike[str], new: Config | dict[str, Any] | str | os.PathLike[str]
) -> list[Change]:
    """Return the changes from `old` to `new`, sorted by path, as (path, old value, new value).

    Each argument is a config, its data (`to_dict`) or the path of its file. Imports nothing that the files name.
    """
    before, after = flatten(_data(old)), flatten(_data(new))
    pairs = (
        (path, before.get(path, Name(ABSENT)), after.get(path, Name(ABSENT)))
        for path in sorted(before.keys() | after.keys())
    )
    return [Change(path or "$type", one, two) for path, one, two in pairs if repr(one) != repr(two)]


def _data(source: Config | dict[str, Any] | str | os.PathLike[str]) -> Any:
    return source if isinstance(source, (Config, dict)) else read_json(source)


def flatten(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Return {path: value} of a config or its data: each class as a Name, each field in its `readable` form."""
    return dict(_flatten(encode(config, strict=False) if isinstance(config, Config) else config, ""))


def _flatten(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not _holds_config(data):
        yield path, readable(data)
    elif "$type" in data:
        yield path, Name(data["$type"])
        for name, item in data.items():
            if name != "$type":
                yield from _flatten(item, join(path, name))
    else:
        yield from (pair for name, item in _parts(data) for pair in _flatten(item, join(path, name)))


def _holds_config(data: Any) -> bool:
    if isinstance(data, dict) and "$type" in data:
        return True
    return any(_holds_config(item) for _, item in _parts(data))


def _parts(data: Any) -> list[tuple[str, Any]]:
    if isinstance(data, dict) and "$tuple" in data:
        data = data["$tuple"]
    if isinstance(data, dict) and "$dict" in data:
        return [(repr(readable(key)), item) for key, item in data["$dict"]]
    if isinstance(data, list):
        return [(str(index), item) for index, item in enumerate(data)]
    return list(data.items()) if isinstance(data, dict) else []


def readable(data: Any) -> Any:
    """Return encoded data as a Python value for printing; classes, functions, dtypes and paths become Names."""
    if isinstance(data, list):
        return [readable(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "$tuple" in data:
        return tuple(map(readable, data["$tuple"]))
    if "$set" in data or "$frozenset" in data:
        items = ", ".join(repr(readable(item)) for item in next(iter(data.values())))
        return Name(f"{{{items}}}")
    if "$dict" in data:
        return {readable(key): readable(item) for key, item in data["$dict"]}
    if "$enum" in data:
        return Name(f"{data['$enum']}.{data['name']}")
    if "$dtype" in data:
        return Name(f"torch.{data['$dtype']}")
    if "$float" in data:
        return float(data["$float"])
    if "$partial" in data:
        arguments = [repr(readable(item)) for item in data["args"]]
        arguments += [f"{name}={readable(item)!r}" for name, item in data["keywords"].items()]
        return Name(f"partial({', '.join([repr(readable(data['$partial'])), *arguments])})")
    if "$function" in data or "$path" in data:
        return Name(data.get("$function", data.get("$path")))
    return {name: readable(item) for name, item in data.items()}
