"""The thread that writes while training goes on, and what a disk that fails means to the run."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import SaveFailed
from titan_ckpt.save.save import Snapshot

logger = logging.getLogger(__name__)

_ATTEMPTS, _PAUSE_S = 2, 1.0


class Writer:
    """Writes one snapshot at a time; every method is a collective of all ranks.

    A disk that fails is logged at once, and the snapshot is written once more. A save that failed twice is left out, up
    to `max_failed_saves` in a row.

    Args:
        ranks: over which the thread talks, so nobody else may until `settle` or `wait`.
        yields: whether the thread leaves the processor to those that compute.
        max_failed_saves: how many saves in a row may fail.
    """

    def __init__(self, ranks: CollectiveGuard, yields: bool, max_failed_saves: int) -> None:
        self._ranks = ranks
        self._max_failed_saves = max_failed_saves
        self._failed_saves = 0
        self._thread = ThreadPoolExecutor(1, "titan-ckpt", _yield_to_training if yields else None)
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[Snapshot], None], then: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        """Begin to write a snapshot, and do `then` once it is published; the last one must be settled."""
        self._pending = self._thread.submit(self._run, write, then, snapshot)

    def wait(self) -> None:
        """Block until the snapshot is published.

        Raises:
            CheckpointError: when that failed; it is said once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self, is_last: bool = False) -> None:
        """Wait for the save before; go on without it where the disk failed. `is_last` tries another one in any case.

        Raises:
            CheckpointError: when it failed for another reason, or was one failure too many.
        """
        try:
            self.wait()
        except SaveFailed as error:
            if not is_last and self._failed_saves >= self._max_failed_saves:
                raise SaveFailed(f"{self._failed_saves} saves in a row failed, the last so: {error}") from error

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _run(self, write: Callable[[Snapshot], None], then: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        try:
            self._write(write, snapshot)
        except SaveFailed:
            self._failed_saves += 1
            raise
        self._failed_saves = 0
        then(snapshot)

    def _write(self, write: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return write(snapshot)
            except SaveFailed as error:
                if self._ranks.is_first:
                    logger.error("Attempt %d of %d: %s", attempt, _ATTEMPTS, error)
                if attempt == _ATTEMPTS:
                    raise
            time.sleep(_PAUSE_S)


def _yield_to_training() -> None:
    """Let this thread have what the threads that compute leave; Linux alone has priorities for threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 10)
