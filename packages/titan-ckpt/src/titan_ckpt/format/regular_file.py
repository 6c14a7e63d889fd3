"""Reads of regular files: kind and size are checked first, and I/O errors are retried."""

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
from titan_ckpt.format.strict_json import parse_finite, reject_duplicate_keys

T = TypeVar("T")

_BLOCK = 1 << 24
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_PAUSES_S = (0.1, 0.3, 0.9)


class FileMissing(BrokenCheckpoint):
    """A file of a checkpoint does not exist."""


def retry_io(action: Callable[[], T], path: Path) -> T:
    """Return the result of `action`; an I/O error at `path` is retried three times, within about 1.3 s.

    Raises:
        CheckpointError: if the last attempt fails. It is not a BrokenCheckpoint: an unreadable file may be intact.
    """
    for pause in (*_PAUSES_S, None):
        try:
            return action()
        except OSError as error:
            if pause is None:
                raise CheckpointError(
                    f"{path} must be readable, got {error} in {len(_PAUSES_S) + 1} attempts. Nothing was loaded, "
                    f"moved or deleted. Restore the disk or the permissions and restart, or move {path.parent} away."
                ) from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def size_of(path: Path) -> int:
    """Return the size of a regular file, or of the regular file that a link points to, in bytes.

    Raises:
        FileMissing: if it does not exist.
        BrokenCheckpoint: if it is a folder, FIFO, device or socket.
        CheckpointError: if the disk fails.
    """

    def look() -> os.stat_result | None:
        try:
            return os.stat(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    found = retry_io(look, path)
    if found is None and not os.path.lexists(path.parent):
        raise FileMissing(f"{path.parent} does not exist")
    if found is None:
        raise FileMissing(f"{path.name} is missing")
    if not stat.S_ISREG(found.st_mode):
        raise BrokenCheckpoint(f"{path.name} is not a regular file")
    return found.st_size


def record_of(path: Path) -> FileRecord:
    """Return the record of a regular file as it is on the disk. Raises the errors of `size_of`."""
    expected = size_of(path)

    def read() -> FileRecord:
        digest, size = xxhash.xxh3_64(), 0
        with _open(path) as file:
            while size < expected and (block := file.read(min(_BLOCK, expected - size))):
                digest.update(block)
                size += len(block)
        return FileRecord(size, digest.hexdigest())

    return retry_io(read, path)


def read_json(path: Path, max_bytes: int, constants: bool = False) -> Any:
    """Return the data of a JSON file of at most `max_bytes` bytes; NaN and Infinity are allowed only with `constants`.

    Raises:
        BrokenCheckpoint: if it is larger or not JSON. Also the errors of `size_of`.
    """
    size = size_of(path)
    if size > max_bytes:
        raise BrokenCheckpoint(f"{path.name} must have at most {max_bytes} bytes, got {size}")

    def read() -> bytes:
        with _open(path) as file:
            return file.read(size)

    content = retry_io(read, path)
    try:
        if constants:
            return json.loads(content, object_pairs_hook=reject_duplicate_keys)
        return json.loads(
            content, object_pairs_hook=reject_duplicate_keys, parse_constant=parse_finite, parse_float=parse_finite
        )
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    """Open a file without blocking, even if a FIFO has replaced it since the check."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
