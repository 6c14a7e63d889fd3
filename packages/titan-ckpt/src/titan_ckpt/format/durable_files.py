"""Durable files: hashed while written, flushed to the disk, published by a rename."""

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
    """Expected size of a file in bytes, and the xxh3 of its content (64 bits, hexadecimal)."""

    size: int
    xxh3: str


def write_blocks(path: Path, blocks: Iterable[Any]) -> FileRecord:
    """Write buffers to a new file, hash them while writing, and flush the file to the disk; return its record.

    Raises:
        FileExistsError: if a file of that name exists.
    """
    digest, size = xxhash.xxh3_64(), 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
            del block  # free it before the next one is created
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def encode_json(data: Any) -> bytes:
    """Return `data` as the content of a JSON file, on one line: Python's fast encoder cannot indent."""
    return (json.dumps(data) + "\n").encode()


def write_json(path: Path, data: Any) -> FileRecord:
    """Write `data` as a new JSON file and return its record."""
    return write_blocks(path, [encode_json(data)])


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a folder of flushed files to an unused name, so that it exists completely or not at all.

    Raises:
        FileExistsError: if the name is in use.
    """
    rename_flushed(temporary, final)
    flush_folder(final.parent)


def rename_flushed(temporary: Path, final: Path) -> None:
    """Rename a folder of flushed files to an unused name, without flushing the new name.

    Raises:
        FileExistsError: if the name is in use.
    """
    if final.exists():
        raise FileExistsError(errno.EEXIST, "The name is in use", str(final))
    flush_folder(temporary)
    os.rename(temporary, final)
