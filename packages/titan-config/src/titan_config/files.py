"""Configs as JSON text and JSON files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from titan_config.codec import from_dict, to_dict
from titan_config.configurable import Config
from titan_config.errors import ConfigError
from titan_config.importing import DEFAULT_ALLOW


def to_json(config: Config) -> str:
    """Return a config as JSON text that `from_json` reads back without loss."""
    import json

    return json.dumps(to_dict(config), indent=2, allow_nan=False)


def from_json(text: str, allow: Sequence[str] = DEFAULT_ALLOW) -> Any:
    """Return the config that `to_json` wrote. Raises ConfigError with the line, or with the path of a bad value."""
    return from_dict(parse_json(text, "JSON"), allow)


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a config to a JSON file, whole or not at all; folders that are missing are made."""
    text, path = to_json(config) + "\n", os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)


def load(path: str | os.PathLike[str], allow: Sequence[str] = DEFAULT_ALLOW) -> Any:
    """Return the config that `save` wrote. Raises ConfigError with the file, and the line or the path in the tree."""
    data = read_json(path)
    try:
        return from_dict(data, allow)
    except ConfigError as error:
        error.file = os.fspath(path)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON data in a file. Raises ConfigError with file and line."""
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            return parse_json(file.read(), name)
    except OSError as error:
        raise ConfigError(
            f"Got no text from this file: {error.strerror}. A saved config is a JSON file. Give the path of one.",
            file=name,
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Got bytes that are not UTF-8 text ({error.reason}). A saved config is a JSON file. Give the path of one.",
            file=name,
        ) from error


def parse_json(text: str, name: str) -> Any:
    """Return the data in JSON `text`; `name` is what an error calls it."""
    import json

    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        line = text[: error.pos].rpartition("\n")[2] + text[error.pos :].partition("\n")[0]
        raise ConfigError(
            f"Got text that is not JSON at column {error.colno}: {error.msg} ({line.strip()[:80]!r}). A saved config "
            "is one JSON object. Correct the line.",
            file=f"{name}:{error.lineno}",
        ) from error
    except _Duplicate as error:
        raise ConfigError(
            f"Got the key {error} twice in one object. Each field has one value. Remove one of them.", file=name
        ) from None


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Duplicate(next(key for key in keys if keys.count(key) > 1))
    return data
