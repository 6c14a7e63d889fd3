"""One process at a time saves to a folder."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.strict_json import is_there

logger = logging.getLogger(__name__)


class ProcessLock:
    """Keeps other processes out until `release` or the end of this one: after `kill -9` too, the kernel lets go.

    It is POSIX's record lock on the (empty) file `path`: children that are forked do not have it, and this process may
    take it again. On a file system without such locks it keeps nobody out (`is_held` is False), and the log says so.

    Raises:
        CheckpointError: when another process has it, or `path` is there and no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_held = False
        self._descriptor: int | None = None
        self._take()

    def check(self) -> None:
        """Make sure that this process still has the lock: the file may be gone, or the folder another one.

        Raises:
            CheckpointError: when another process has it now.
        """
        if not self.is_held:
            return
        try:
            here, there = os.fstat(-1 if self._descriptor is None else self._descriptor), os.stat(self.path)
            same = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
        except FileNotFoundError:
            same = False
        if not same:
            logger.warning("The lock %s was deleted or replaced; it is taken again.", self.path)
            self.release()
        self._take()  # again, if it is held: closing the file anywhere in this process has let it go

    def release(self) -> None:
        """Let others in."""
        descriptor, self._descriptor = self._descriptor, None
        self.is_held = False
        if descriptor is not None:
            os.close(descriptor)

    def _take(self) -> None:
        try:
            if self._descriptor is None:
                is_there(self.path)  # which raises for what no two processes would lock
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_held = True
        except OSError as error:
            opened = self._descriptor is not None
            self.release()
            if opened and isinstance(error, BlockingIOError | PermissionError):  # POSIX: either, when another has it
                raise CheckpointError(
                    f"{self.path.parent} must be used by one process at a time, got another that saves there. "
                    f"`fuser {self.path}` names it."
                ) from error
            logger.warning("Nothing keeps a second run out of %s: %s.", self.path.parent, error)
