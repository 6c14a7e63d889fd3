"""Validation of single values in the JSON files of a checkpoint."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection
from typing import Any

from titan_ckpt.errors import BrokenCheckpoint

MAX_INT64 = 2**63 - 1
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


def to_object(value: Any, name: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return a value that must be an object, with exactly these keys if they are given.

    Raises:
        BrokenCheckpoint: if it is not.
    """
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{name} must be an object, got {reprlib.repr(value)}")
    if keys is not None and set(value) != set(keys):
        raise BrokenCheckpoint(f"{name} must have the keys {sorted(keys)}, got {reprlib.repr(sorted(value))}")
    return value


def to_list(value: Any, name: str) -> list[Any]:
    """Return a value that must be a list.

    Raises:
        BrokenCheckpoint: if it is not.
    """
    if not isinstance(value, list):
        raise BrokenCheckpoint(f"{name} must be a list, got {reprlib.repr(value)}")
    return value


def to_integer(value: Any, name: str, minimum: int = 0) -> int:
    """Return a value that must be an integer from `minimum` to 2^63 - 1.

    Raises:
        BrokenCheckpoint: if it is not.
    """
    if type(value) is not int or not minimum <= value <= MAX_INT64:
        raise BrokenCheckpoint(f"{name} must be an integer from {minimum} to 2^63 - 1, got {reprlib.repr(value)}")
    return value


def to_integers(value: Any, name: str) -> tuple[int, ...]:
    """Return a value that must be a list of integers from 0 to 2^63 - 1.

    Raises:
        BrokenCheckpoint: if it is not.
    """
    return tuple(to_integer(item, name) for item in to_list(value, name))


def to_text(value: Any, name: str, pattern: str = ".*") -> str:
    """Return a value that must be a string, all of which matches `pattern`.

    Raises:
        BrokenCheckpoint: if it is not.
    """
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
        raise BrokenCheckpoint(f"{name} must be a string that matches {pattern}, got {reprlib.repr(value)}")
    return value


def to_file_name(value: Any, name: str) -> str:
    """Return a value that must be a plain file name: letters, digits, dots, dashes and underscores, without a folder.

    Raises:
        BrokenCheckpoint: if it is not.
    """
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        raise BrokenCheckpoint(f"{name} must be a plain file name, got {reprlib.repr(value)}")
    return value
