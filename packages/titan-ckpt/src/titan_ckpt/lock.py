"""A lock that keeps other processes from saving to the same folder."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.strict_json import regular_file_exists

logger = logging.getLogger(__name__)


class ProcessLock:
    """Excludes other processes until `release` or the end of this process, even by `kill -9` (the kernel releases it).

    It is a POSIX record lock on the empty file `path`: forked children do not inherit it, and the process that holds it
    may acquire it again. On a file system without such locks nothing is excluded: `is_held` is False, and a warning is
    logged.

    Raises:
        CheckpointError: if another process holds the lock, or `path` exists and is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_held = False
        self._descriptor: int | None = None
        self._acquire()

    def check(self) -> None:
        """Check that this process still holds the lock; acquire it again if its file was deleted or replaced.

        Raises:
            CheckpointError: if another process holds it now.
        """
        if not self.is_held:
            return
        try:
            here, there = os.fstat(-1 if self._descriptor is None else self._descriptor), os.stat(self.path)
            same = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
        except FileNotFoundError:
            same = False
        if not same:
            logger.warning("The lock file %s was deleted or replaced; acquiring it again.", self.path)
            self.release()
        self._acquire()  # even if held: closing the file anywhere in this process releases a POSIX record lock

    def release(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, None
        self.is_held = False
        if descriptor is not None:
            os.close(descriptor)

    def _acquire(self) -> None:
        try:
            if self._descriptor is None:
                regular_file_exists(self.path)  # raises for a file that cannot be locked, such as a FIFO
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_held = True
        except OSError as error:
            opened = self._descriptor is not None
            self.release()
            is_locked = isinstance(error, BlockingIOError | PermissionError)  # POSIX allows either error
            if opened and is_locked:
                raise CheckpointError(
                    f"{self.path.parent} must be used by one process at a time, got another process that saves there. "
                    f"Run `fuser {self.path}` to find it."
                ) from error
            logger.warning("Cannot lock %s against a second run: %s.", self.path.parent, error)
