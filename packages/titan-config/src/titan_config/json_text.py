"""Strict JSON parser: unique keys, finite numbers, and limits on size and depth."""

from __future__ import annotations

import math
from typing import Any

from titan_config.errors import ConfigError

MAX_CHARACTERS = 64 * 2**20
MAX_DEPTH = 100
MAX_DIGITS = 4300
"""Maximum digits of an integer; Python's own limit for converting a string to int."""


def parse_json(text: str, name: str) -> Any:
    """Return the data in JSON `text`. Raises ConfigError with the file `name` and the line."""
    import json

    try:
        return parse_strictly(text)
    except json.JSONDecodeError as error:
        line = text[: error.pos].rpartition("\n")[2] + text[error.pos :].partition("\n")[0]
        raise ConfigError(
            f"A saved config must be JSON, got {line.strip()[:80]!r}, column {error.colno}: {error.msg}.",
            file=f"{name}:{error.lineno}",
        ) from error
    except ConfigError as error:
        error.file = name
        raise


def parse_strictly(text: str) -> Any:
    """Return the data in JSON `text`.

    Raises json.JSONDecodeError for invalid JSON, ConfigError for duplicate keys, non-finite numbers or exceeded limits.
    """
    import json

    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"A saved config must have at most {MAX_CHARACTERS:,} characters, got more.")
    try:
        data = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise _too_deep() from None
    require_shallow(data)
    return data


def require_shallow(data: Any) -> None:
    """Raise ConfigError if lists and objects are nested more than `MAX_DEPTH` levels deep."""
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [part for item in level if isinstance(item, (list, dict)) for part in _parts(item)]
        if not level:
            return
    if any(isinstance(item, (list, dict)) for item in level):
        raise _too_deep()


def _parts(data: list[Any] | dict[str, Any]) -> Any:
    return data.values() if isinstance(data, dict) else data


def _too_deep() -> ConfigError:
    return ConfigError(f"Lists and objects must be nested at most {MAX_DEPTH} levels deep, got more levels.")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ConfigError(f"An integer must have at most {MAX_DIGITS} digits, got {len(text)}.")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ConfigError(
            f"A number in JSON must be finite, got {text[:80]}. "
            'For a field that allows it, write {"$float": "inf"} or {"$float": "nan"}.'
        )
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"Keys of a JSON object must be unique, got {twice} more than once.")
    return data
