"""Files that go from memory to the disk past the page cache, which costs the processor a tenth."""

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

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
_MOST_AT_ONCE = 1 << 30  # some systems refuse 2 GiB


def whole_pages(size: int, pinned: bool = False) -> Tensor:
    """Return `size` bytes, rounded up to whole pages, that begin at a page; `pinned` for copies from an accelerator."""
    length = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    if pinned:
        return torch.empty(length, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel may be without; writing from huge pages costs a quarter of the work
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def write_pages(path: Path, pages: memoryview, size: int) -> None:
    """Write the first `size` bytes of whole pages as a new file, and flush it to the disk.

    Where the file system refuses such a write (O_DIRECT), it goes through the page cache: the file is the same.

    Raises:
        FileExistsError: when there is a file of that name.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        direct, done = _set_direct(descriptor, True), 0
        while done < size:
            try:
                done += os.pwrite(descriptor, pages[done : done + _MOST_AT_ONCE], done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = _set_direct(descriptor, False)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Turn direct writes on or off; return whether they are on now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if direct else flags & ~_O_DIRECT)
    except OSError:  # such as tmpfs before Linux 6.6
        return False
    return direct
