"""A safetensors file that maps one tensor at a time into memory, so that only accessed bytes are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.format.regular_file import retry_io
from titan_ckpt.format.safetensors_writer import DTYPES
from titan_ckpt.format.strict_json import is_lfs_pointer, reject_duplicate_keys


class MappedFile:
    """The tensors of a safetensors file; a context manager that keeps it open.

    `safetensors` itself maps the whole file, and the bytes read count as memory of the process until the file is
    closed. Here they count only while a tensor that maps them is referenced.

    Raises:
        CheckpointError: if the file is missing or incomplete, or has a dtype that torch lacks.
    """

    def __init__(self, path: Path) -> None:
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is not a regular file")
            with safe_open(path, framework="pt"):  # checks that the header and the file size agree
                pass
            self._file = path.open("rb")
            header, self._begin = _read_header(self._file)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            if path.is_file() and is_lfs_pointer(path):
                raise CheckpointError(
                    f"{path} must be a complete safetensors file, got a Git LFS pointer. Run `git lfs pull` in its "
                    "folder."
                ) from error
            raise CheckpointError(
                f"{path} must be a complete safetensors file, got {error}. Download or export it again."
            ) from error
        self._entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        for key, entry in self._entries.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"The dtype of {key} in {path} must be one of {', '.join(DTYPES)}, got {entry['dtype']}. Convert "
                    f"the file."
                )

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def meta_tensors(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device: names, shapes and dtypes."""
        return {
            key: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            for key, entry in self._entries.items()
        }

    def tensor(self, key: str) -> Tensor:
        """Return a tensor that reads accessed values from the file; writes to it stay in memory."""
        entry = self._entries[key]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        begin, end = entry["data_offsets"]
        mapped = np.memmap(self._file, dtype=np.uint8, mode="c", offset=self._begin + begin, shape=(end - begin,))
        return torch.from_numpy(mapped).view(dtype).view(shape)


def open_mapped(path: Path) -> MappedFile:
    """Open a tensor file of a checkpoint; I/O errors are retried.

    Raises:
        BrokenCheckpoint: if it is not a complete safetensors file.
        CheckpointError: if the disk fails.
    """

    def attempt() -> MappedFile:
        try:
            return MappedFile(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise BrokenCheckpoint(f"{path.name} cannot be read: {error.__cause__ or error}") from error

    return retry_io(attempt, path)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and the offset of its first tensor."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length), object_pairs_hook=reject_duplicate_keys), 8 + length
