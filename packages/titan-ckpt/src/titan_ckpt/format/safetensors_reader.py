"""A safetensors file whose tensors are mapped into memory one at a time: only what is looked at is read."""

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
from titan_ckpt.format.regular_file import retried
from titan_ckpt.format.safetensors_writer import DTYPES
from titan_ckpt.format.strict_json import is_lfs_pointer, unique


class MappedFile:
    """The tensors of a safetensors file; a context manager that keeps it open.

    `safetensors` itself maps the file as a whole, and what was read of it counts as the process's memory until it is
    closed; here it does as long as a tensor of it is held.

    Raises:
        CheckpointError: when the file is not there, not whole, or holds numbers of a type that torch does not have.
    """

    def __init__(self, path: Path) -> None:
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is no regular file")
            with safe_open(path, framework="pt"):  # checks that the header and the size of the file agree
                pass
            self._file = path.open("rb")
            header, self._begin = _read_header(self._file)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            if path.is_file() and is_lfs_pointer(path):
                raise CheckpointError(
                    f"{path} must be a whole safetensors file, got a Git LFS pointer. Run `git lfs pull` in its folder."
                ) from error
            raise CheckpointError(
                f"{path} must be a whole safetensors file, got {error}. Download or export it again."
            ) from error
        self._entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        for key, entry in self._entries.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"Tensors must be of {', '.join(DTYPES)}, got {entry['dtype']} for {key} of {path}. Convert it."
                )

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def stand_ins(self) -> dict[str, Tensor]:
        """All tensors on the meta device: their names, shapes and types."""
        return {
            key: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            for key, entry in self._entries.items()
        }

    def tensor(self, key: str) -> Tensor:
        """A tensor that reads from the file what is asked of it; what is written to it stays in memory."""
        entry = self._entries[key]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        begin, end = entry["data_offsets"]
        mapped = np.memmap(self._file, dtype=np.uint8, mode="c", offset=self._begin + begin, shape=(end - begin,))
        return torch.from_numpy(mapped).view(dtype).view(shape)


def open_mapped(path: Path) -> MappedFile:
    """Open a tensor file of a checkpoint; an I/O error is tried again.

    Raises:
        BrokenCheckpoint: when it is no whole safetensors file.
        CheckpointError: when the disk fails.
    """

    def attempt() -> MappedFile:
        try:
            return MappedFile(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise BrokenCheckpoint(f"{path.name} cannot be read: {error.__cause__ or error}") from error

    return retried(attempt, path)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """A file's header, and where its tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length), object_pairs_hook=unique), 8 + length
