"""Graceful shutdown on SIGTERM and SIGINT: the step is finished, the run saved, the process ends with code 0."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context in which SIGTERM and SIGINT set `received` instead of ending the process.

    A second SIGINT ends the process at once. If SIGINT was ignored before, as in a background job of a shell, it stays
    ignored.
    """

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                if number is signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        self.received = True
        if signal_number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process even while it waits in C++
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"Stopping after this step. Interrupt again to end the run at once, without saving.\n")
