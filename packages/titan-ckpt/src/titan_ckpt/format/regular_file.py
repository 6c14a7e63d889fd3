"""Files as they are read: kind and size come first, and an I/O error is tried again before it is one."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.format.durable_files import FileRecord
from titan_ckpt.format.strict_json import finite, unique

T = TypeVar("T")

_BLOCK = 1 << 24
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_PAUSES_S = (0.1, 0.3, 0.9)


class Missing(BrokenCheckpoint):
    """There is no file of that name."""


def retried(action: Callable[[], T], path: Path) -> T:
    """Return what `action` returns; an I/O error at `path` is tried again three times within about a second.

    Raises:
        CheckpointError: when it fails still. It is no BrokenCheckpoint: what cannot be read now may be whole.
    """
    for pause in (*_PAUSES_S, None):
        try:
            return action()
        except OSError as error:
            if pause is None:
                raise CheckpointError(
                    f"{path} must be readable, got {error} in {len(_PAUSES_S) + 1} attempts. Nothing was loaded, moved "
                    f"or deleted. Restore the disk or the permissions and start again, or move {path.parent} away."
                ) from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes, or of the one that a link leads to.

    Raises:
        Missing: when there is none.
        BrokenCheckpoint: when it is a folder, a fifo, a device or a socket.
        CheckpointError: when the disk fails.
    """

    def look() -> os.stat_result | None:
        try:
            return os.stat(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    found = retried(look, path)
    if found is None and not os.path.lexists(path.parent):
        raise Missing(f"there is no {path.parent.name} in {path.parent.parent}")
    if found is None:
        raise Missing(f"{path.name} is missing")
    if not stat.S_ISREG(found.st_mode):
        raise BrokenCheckpoint(f"{path.name} is not a regular file")
    return found.st_size


def record_of(path: Path) -> FileRecord:
    """Return the record of a regular file as it is on the disk. Raises what `size_of` does."""
    expected = size_of(path)

    def read() -> FileRecord:
        digest, size = xxhash.xxh3_64(), 0
        with _open(path) as file:
            while size < expected and (block := file.read(min(_BLOCK, expected - size))):
                digest.update(block)
                size += len(block)
        return FileRecord(size, digest.hexdigest())

    return retried(read, path)


def read_json(path: Path, largest: int, constants: bool = False) -> Any:
    """Return the data of a JSON file of at most `largest` bytes; NaN and Infinity only with `constants`.

    Raises:
        BrokenCheckpoint: when it is no such file, or not JSON. Besides, what `size_of` raises.
    """
    size = size_of(path)
    if size > largest:
        raise BrokenCheckpoint(f"{path.name} has {size} bytes and should have at most {largest}")

    def read() -> bytes:
        with _open(path) as file:
            return file.read(size)

    content = retried(read, path)
    try:
        if constants:
            return json.loads(content, object_pairs_hook=unique)
        return json.loads(content, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    """Open without waiting, whatever has come into the file's place since it was looked at."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
