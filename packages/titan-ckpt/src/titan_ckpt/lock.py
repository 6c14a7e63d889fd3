"""One process at a time saves to a folder."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from titan_ckpt.errors import CheckpointError

logger = logging.getLogger(__name__)


class ProcessLock:
    """Keeps other processes out until `release` or the end of this one: after `kill -9` too, the kernel lets go.

    It is POSIX's record lock on the (empty) file `path`: children that are forked do not have it, and this process may
    take it again. On a file system without such locks it keeps nobody out, and the log says so.

    Raises:
        CheckpointError: when another process has it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise CheckpointError(
                f"Got {path.parent}, where another process saves checkpoints (`fuser {path}` says which). Two runs in "
                f"one folder would delete each other's. Wait for its end, stop it, or choose another folder."
            ) from error
        except OSError as error:
            logger.warning("Nothing keeps a second run out of %s: %s.", path.parent, error)

    def release(self) -> None:
        """Let others in."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
