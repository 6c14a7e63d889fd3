"""JSON text to data, strictly: no key twice, finite numbers, and sizes that a config can have."""

from __future__ import annotations

import math
from typing import Any

from titan_config.errors import ConfigError

MAX_CHARACTERS = 64 * 2**20
MAX_DEPTH = 100
MAX_DIGITS = 4300
"""Of an integer; Python reads no more, either."""


def parse_json(text: str, name: str) -> Any:
    """Return the data in JSON `text`; `name` is what an error calls it. Raises ConfigError with the line."""
    import json

    try:
        return parse_strictly(text)
    except json.JSONDecodeError as error:
        line = text[: error.pos].rpartition("\n")[2] + text[error.pos :].partition("\n")[0]
        raise ConfigError(
            f"A saved config must be JSON, got {line.strip()[:80]!r}, column {error.colno}: {error.msg}. Correct the "
            "line.",
            file=f"{name}:{error.lineno}",
        ) from error
    except ConfigError as error:
        error.file = name
        raise


def parse_strictly(text: str) -> Any:
    """Return the data in JSON `text`. Raises json.JSONDecodeError for what is no JSON, ConfigError for odd JSON."""
    import json

    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"The text of a config must have at most {MAX_CHARACTERS:,} characters, got more.")
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
    """Raise ConfigError where lists and objects are nested more than `MAX_DEPTH` deep."""
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
    return ConfigError(f"Lists and objects must be nested at most {MAX_DEPTH} deep, got deeper ones.")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ConfigError(f"An integer must have at most {MAX_DIGITS} digits, got one of {len(text)}.")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ConfigError(
            f"A number in JSON must be finite, got {text[:80]}. "
            'Write {"$float": "inf"} or {"$float": "nan"} for a field that takes it.'
        )
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"A key must be in an object once, got {twice} twice.")
    return data
