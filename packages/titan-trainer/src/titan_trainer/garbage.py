"""Garbage collection at the same step on every rank, since a pause of one rank delays all of them."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Self

from titan_trainer.callbacks import Callback, Record
from titan_trainer.protocols import Run


class GarbageCollection(Callback):
    """No automatic garbage collection during a run, but generations 0 and 1 every `freq` steps."""

    class Config(Callback.Config):
        freq: int
        """Steps from one collection to the next."""

    config: Config

    def __enter__(self) -> Self:
        gc.collect()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()

    def on_step_end(self, run: Run, record: Record) -> None:
        """Collect if the step is a multiple of `freq`."""
        if record["step"] % self.config.freq == 0:
            gc.collect(1)
