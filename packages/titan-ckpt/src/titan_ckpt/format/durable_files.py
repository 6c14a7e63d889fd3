"""Files that are whole when they are there: hashed while written, flushed to the disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

INDEX = "tensors.json"
STATE = "state.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the xxh3 (64 bits, in hexadecimal digits) of its content."""

    size: int
    xxh3: str


def write_blocks(path: Path, blocks: Iterable[Any]) -> FileRecord:
    """Write a new file from buffers, hashing them on the way, and flush it to the disk.

    Raises:
        FileExistsError: when there is a file of that name.
    """
    digest, size = xxhash.xxh3_64(), 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
            del block  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def encode_json(data: Any) -> bytes:
    """Return `data` as the content of a JSON file, on one line: Python's fast encoder does not indent."""
    return (json.dumps(data) + "\n").encode()


def write_json(path: Path, data: Any) -> FileRecord:
    """Write `data` as a new JSON file; returns its record."""
    return write_blocks(path, [encode_json(data)])


def flush_folder(path: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a folder whose files are flushed to a name that is free, so that it is there whole or not at all.

    Raises:
        FileExistsError: when there is something of that name.
    """
    rename_flushed(temporary, final)
    flush_folder(final.parent)


def rename_flushed(temporary: Path, final: Path) -> None:
    """Do what `publish` does, but for flushing the new name."""
    if final.exists():
        raise FileExistsError(errno.EEXIST, "There is such a name already", str(final))
    flush_folder(temporary)
    os.rename(temporary, final)
