"""The head takes the loss: while one is set, the module that makes the logits returns the loss sum in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from titan_parallel.step.batch import Head, Loss


class Taken:
    """The `(sum, count)` of a loss, once the head has taken it."""

    sum: Tensor | None = None
    count: Tensor | None = None


class HeadForward:
    """The forward of a model's head.

    Hidden states enter the head once; the loss then makes logits of them as often as it likes (in chunks, and again in
    the backward), all within one call of the head: its weight is gathered once, and its gradient reduced once.
    """

    def __init__(
        self, logits: Head, *, logits_for_loss: Head | None = None, enter: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`logits` makes those of the plain head; the loss may get others. Hidden states first go through `enter`."""
        self._logits = logits
        self._logits_for_loss = logits_for_loss or logits
        self._enter = enter
        self._loss: Loss | None = None
        self._targets: Any = None
        self._taken = Taken()

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._enter is not None:
            hidden = self._enter(hidden)
        if self._loss is None:
            return self._logits(hidden)
        self._taken.sum, self._taken.count = self._loss(self._logits_for_loss, hidden, self._targets)
        return self._taken.sum

    @contextmanager
    def taking(self, loss: Loss, targets: Any) -> Iterator[Taken]:
        """Take `loss` in place of returning logits."""
        self._loss, self._targets, self._taken = loss, targets, Taken()
        try:
            yield self._taken
        finally:
            self._loss = self._targets = None
