"""SIGTERM as a polite request: the step is finished, the run saved, the process ends with code 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context in which SIGTERM sets `received` instead of ending the process."""

    def __init__(self) -> None:
        self.received = False
        self.previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self.previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        self.received = True
