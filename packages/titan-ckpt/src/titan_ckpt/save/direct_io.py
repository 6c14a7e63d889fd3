"""O_DIRECT writes: they bypass the page cache and cost about a tenth of the CPU time of a buffered write."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # absent on macOS
_MAX_WRITE_BYTES = 1 << 30  # some systems reject writes of 2 GiB


def allocate_pages(size: int, pinned: bool = False) -> Tensor:
    """Return at least `size` bytes of page-aligned memory, rounded up to whole pages.

    `pinned` is for copies from an accelerator.
    """
    length = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    if pinned:
        return torch.empty(length, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # the kernel may lack huge pages, which reduce the CPU time to a quarter
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def write_pages(path: Path, pages: memoryview, size: int) -> None:
    """Write the first `size` bytes of `pages` as a new file, and flush it to the disk.

    If the file system rejects O_DIRECT, the same bytes are written through the page cache.

    Raises:
        FileExistsError: if a file of that name exists.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        direct, done = _set_direct(descriptor, True), 0
        while done < size:
            try:
                done += os.pwrite(descriptor, pages[done : done + _MAX_WRITE_BYTES], done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = _set_direct(descriptor, False)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Turn O_DIRECT on or off; return whether it is on now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if direct else flags & ~_O_DIRECT)
    except OSError:  # for example tmpfs before Linux 6.6
        return False
    return direct
