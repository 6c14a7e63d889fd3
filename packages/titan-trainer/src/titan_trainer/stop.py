"""SIGTERM and SIGINT as polite requests: the step is finished, the run saved, the process ends with code 0."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context in which SIGTERM and SIGINT set `received` instead of ending the process; a second SIGINT ends it.

    SIGINT stays ignored where it was, as in a job in the background.
    """

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
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
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the process waits outside of Python
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"Stopping after this step, and saving it. Another interrupt ends the run at once.\n")
