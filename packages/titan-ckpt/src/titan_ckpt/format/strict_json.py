"""JSON read strictly: no key twice, no number that is not finite."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError

_LFS_BEGIN = b"version https://git-lfs"
_LFS_POINTER = "a Git LFS pointer"


def is_there(path: Path) -> bool:
    """Return whether there is a regular file of that name, itself or through a link.

    Raises:
        CheckpointError: when it is a folder, a fifo, a device, or a link to nothing.
    """
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        kind = "a link to nothing" if not path.exists() else "a folder" if path.is_dir() else "a fifo or a device"
        raise CheckpointError(f"{path} must be a regular file, got {kind}.")
    return True


def read_json(path: Path, key: str | None = None) -> dict[str, Any]:
    """Return the JSON object in a file, or the one that is its value of `key`.

    Raises:
        CheckpointError: when there is none, it is a Git LFS pointer, an object has a key twice, a number is not finite,
            or the file is nested deeper than Python reads.
    """
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (OSError, ValueError, RecursionError) as error:
        got = _LFS_POINTER if is_lfs_pointer(path) else f"{error!r:.300}"
        raise _not_object(path, key, got) from error
    if not isinstance(data, dict):
        raise _not_object(path, key, f"a {type(data).__name__}")
    if key is None:
        return data
    if not isinstance(data.get(key), dict):
        raise _not_object(path, key, f"a {key} of type {type(data[key]).__name__}" if key in data else "none")
    return data[key]


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS leaves in the place of one that was not downloaded."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_BEGIN)) == _LFS_BEGIN
    except OSError:
        return False


def _not_object(path: Path, key: str | None, got: str) -> CheckpointError:
    with_key = f" with an object {key}" if key else ""
    return CheckpointError(f"{path} must be a JSON object{with_key}, got {got}. Download or export it again.")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError when it has a key twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return data


def finite(text: str) -> float:
    """Return the number that a JSON text writes. Raises ValueError when it is not finite."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.40} is not finite")
    return number
