"""Checks of what a checkpoint's JSON files say, one value at a time."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection
from typing import Any

from titan_ckpt.errors import BrokenCheckpoint

LARGEST = 2**63 - 1
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


def to_object(value: Any, name: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return a value that is an object, with exactly these keys if they are given.

    Raises:
        BrokenCheckpoint: when it is not.
    """
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{name} must be an object, got {reprlib.repr(value)}")
    if keys is not None and set(value) != set(keys):
        raise BrokenCheckpoint(f"{name} must have the keys {sorted(keys)}, got {reprlib.repr(sorted(value))}")
    return value


def to_list(value: Any, name: str) -> list[Any]:
    """Return a value that is a list.

    Raises:
        BrokenCheckpoint: when it is not.
    """
    if not isinstance(value, list):
        raise BrokenCheckpoint(f"{name} must be a list, got {reprlib.repr(value)}")
    return value


def to_integer(value: Any, name: str, least: int = 0) -> int:
    """Return a value that is an integer from `least` to 2^63 - 1.

    Raises:
        BrokenCheckpoint: when it is not.
    """
    if type(value) is not int or not least <= value <= LARGEST:
        raise BrokenCheckpoint(f"{name} must be an integer from {least} to 2^63 - 1, got {reprlib.repr(value)}")
    return value


def to_integers(value: Any, name: str) -> tuple[int, ...]:
    """Return a value that is a list of integers from 0 to 2^63 - 1.

    Raises:
        BrokenCheckpoint: when it is not.
    """
    return tuple(to_integer(item, name) for item in to_list(value, name))


def to_text(value: Any, name: str, pattern: str = ".*") -> str:
    """Return a value that is text, as a whole of `pattern`.

    Raises:
        BrokenCheckpoint: when it is not.
    """
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
        raise BrokenCheckpoint(f"{name} must be text that matches {pattern}, got {reprlib.repr(value)}")
    return value


def to_file_name(value: Any, name: str) -> str:
    """Return a value that is the plain name of a file: letters, digits, dots, dashes, and no folder.

    Raises:
        BrokenCheckpoint: when it is not.
    """
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        raise BrokenCheckpoint(f"{name} must be a plain file name, got {reprlib.repr(value)}")
    return value
