"""Save and load configs as JSON text and JSON files."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from titan_config.codec import from_dict, to_dict
from titan_config.configurable import Config
from titan_config.errors import ConfigError
from titan_config.importing import DEFAULT_ALLOW
from titan_config.json_text import MAX_CHARACTERS, parse_json
from titan_config.local_path import require_local


def to_json(config: Config) -> str:
    """Return a config as JSON text that `from_json` restores without loss. Raises ConfigError for an invalid config."""
    import json

    return json.dumps(to_dict(config), indent=2, allow_nan=False)


def from_json(text: str, allow: Sequence[str] = DEFAULT_ALLOW) -> Any:
    """Return the config in JSON text written by `to_json`. Raises ConfigError with the line or the path in the tree."""
    return from_dict(parse_json(text, "JSON"), allow)


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a config to a JSON file atomically, creating missing folders. Raises ConfigError for an invalid config."""
    require_local(path, "A config file")
    text, path = to_json(config) + "\n", os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)


def load(path: str | os.PathLike[str], allow: Sequence[str] = DEFAULT_ALLOW) -> Any:
    """Return the config in a file written by `save`. Raises ConfigError with the file and the line or tree path."""
    data = read_json(path)
    try:
        return from_dict(data, allow)
    except ConfigError as error:
        error.file = os.fspath(path)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON data in a file. Raises ConfigError with the file and the line."""
    require_local(path, "A config file")
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError("A config file must be a regular file, got a fifo or a device.", file=name)
            return parse_json(file.read(MAX_CHARACTERS + 1), name)
    except OSError as error:
        raise ConfigError(
            f"The config file cannot be read: {error.strerror}.",
            file=name,
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"A config file must be UTF-8 text, got invalid bytes ({error.reason}).",
            file=name,
        ) from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking, so that a fifo with no writer does not hang."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
