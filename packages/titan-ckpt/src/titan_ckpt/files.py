"""Files that are whole when they are there: hashed while written, flushed to the disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch's types and their names in a safetensors file."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_BLOCK = 1 << 24


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
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_json(path: Path, data: Any) -> FileRecord:
    """Write `data` as a new JSON file, on one line: Python's fast encoder does not indent; returns its record."""
    return write_blocks(path, [(json.dumps(data) + "\n").encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write tensors as a new safetensors file, one after the other without a copy in memory; returns its record.

    Source: https://github.com/huggingface/safetensors, "Format". `safetensors` itself would write the same file, but
        makes it in memory and cannot hash it on the way.
    """
    return write_blocks(path, _safetensors_blocks(tensors, metadata or {}))


def _safetensors_blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterable[Any]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def record_of(path: Path) -> FileRecord:
    """Return the record of a file as it is on the disk."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


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
    if final.exists():
        raise FileExistsError(errno.EEXIST, "There is such a name already", str(final))
    flush_folder(temporary)
    os.rename(temporary, final)
    flush_folder(final.parent)
