"""The background thread that writes checkpoints, with retries and a limit on consecutive failures."""

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


class BackgroundWriter:
    """Writes one snapshot at a time; every method is a collective of all ranks.

    A failed write is logged at once and tried a second time. A save that failed twice is skipped, up to
    `max_failed_saves` times in a row.

    Args:
        guard: used by the thread; no other code may use it until `finish_previous` or `wait` returns.
        low_priority: run the thread at a lower priority than the training threads.
        max_failed_saves: number of consecutive saves that may fail.
    """

    def __init__(self, guard: CollectiveGuard, low_priority: bool, max_failed_saves: int) -> None:
        self._guard = guard
        self._max_failed_saves = max_failed_saves
        self._failed_saves = 0
        self._thread = ThreadPoolExecutor(1, "titan-ckpt", _lower_priority if low_priority else None)
        self._pending: Future[None] | None = None

    def submit(
        self, write: Callable[[Snapshot], None], on_published: Callable[[Snapshot], None], snapshot: Snapshot
    ) -> None:
        """Start to write a snapshot; call `on_published` after it is published. Call `finish_previous` first."""
        self._pending = self._thread.submit(self._run, write, on_published, snapshot)

    def wait(self) -> None:
        """Block until the snapshot is published.

        Raises:
            CheckpointError: if that failed; raised once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish_previous(self, is_last: bool = False) -> None:
        """Wait for the previous save and tolerate its disk failure; `is_last` tolerates any number of failures.

        Raises:
            CheckpointError: if it failed for another reason than the disk, or was one failure too many.
        """
        try:
            self.wait()
        except SaveFailed as error:
            if not is_last and self._failed_saves >= self._max_failed_saves:
                raise SaveFailed(f"{self._failed_saves} consecutive saves failed, the last with: {error}") from error

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    def _run(
        self, write: Callable[[Snapshot], None], on_published: Callable[[Snapshot], None], snapshot: Snapshot
    ) -> None:
        try:
            self._write(write, snapshot)
        except SaveFailed:
            self._failed_saves += 1
            raise
        self._failed_saves = 0
        on_published(snapshot)

    def _write(self, write: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return write(snapshot)
            except SaveFailed as error:
                if self._guard.is_first:
                    logger.error("Attempt %d of %d: %s", attempt, _ATTEMPTS, error)
                if attempt == _ATTEMPTS:
                    raise
            time.sleep(_PAUSE_S)


def _lower_priority() -> None:
    """Lower the priority of this thread below the training threads (only Linux has thread priorities)."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 10)
