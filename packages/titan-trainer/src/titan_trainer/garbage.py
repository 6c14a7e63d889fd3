"""Garbage collection at the same step on every rank: one rank's pause is everybody's."""

from __future__ import annotations

import gc
from types import TracebackType


class CollectedGarbage:
    """A context without automatic collection; `step_ended` collects the young generations every `freq` steps."""

    def __init__(self, freq: int) -> None:
        self.freq = freq

    def __enter__(self) -> CollectedGarbage:
        gc.collect()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()

    def step_ended(self, step: int) -> None:
        """Collect if `step` is due."""
        if step % self.freq == 0:
            gc.collect(1)
