"""Strict JSON: duplicate keys and non-finite numbers are errors."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError

_LFS_BEGIN = b"version https://git-lfs"
_LFS_POINTER = "a Git LFS pointer"


def regular_file_exists(path: Path) -> bool:
    """Return whether `path` is a regular file, or a link to one.

    Raises:
        CheckpointError: if it is a folder, FIFO, device or dangling link.
    """
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        kind = "a dangling link" if not path.exists() else "a folder" if path.is_dir() else "a FIFO or a device"
        raise CheckpointError(f"{path} must be a regular file, got {kind}.")
    return True


def read_json(path: Path, key: str | None = None) -> dict[str, Any]:
    """Return the JSON object in a file, or the object under its key `key`.

    Raises:
        CheckpointError: if there is no such object, the file is a Git LFS pointer, a key is duplicated, a number is not
            finite, or the nesting is deeper than Python can parse.
    """
    try:
        data = json.loads(
            path.read_bytes(),
            object_pairs_hook=reject_duplicate_keys,
            parse_constant=parse_finite,
            parse_float=parse_finite,
        )
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
    """Return whether a file is the placeholder of a file that Git LFS has not downloaded."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_BEGIN)) == _LFS_BEGIN
    except OSError:
        return False


def _not_object(path: Path, key: str | None, got: str) -> CheckpointError:
    with_key = f" with the object {key}" if key else ""
    return CheckpointError(f"{path} must be a JSON object{with_key}, got {got}. Download or export it again.")


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary. Raises ValueError for a duplicate key."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is duplicated")
    return data


def parse_finite(text: str) -> float:
    """Return the number in a JSON text. Raises ValueError if it is not finite."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.40} is not finite")
    return number
