"""Loss in the head: while a loss is set, the module that computes the logits returns the loss sum instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from titan_parallel.step.batch import Head, Loss


class Taken:
    """The `(sum, count)` of a loss; None until the head has computed the loss."""

    sum: Tensor | None = None
    count: Tensor | None = None


class HeadForward:
    """The forward of a model's head.

    Hidden states enter the head once. The loss may then compute logits any number of times (in chunks, and again in
    the backward) within that call of the head, so that the weight of the head is gathered once and its gradient is
    reduced once.
    """

    def __init__(
        self, logits: Head, *, logits_for_loss: Head | None = None, enter: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`logits` computes the logits of the head; the loss calls `logits_for_loss` (None: `logits`).

        Hidden states go through `enter` first (None: unchanged).
        """
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
        """Return the sum of `loss` instead of logits inside the context."""
        self._loss, self._targets, self._taken = loss, targets, Taken()
        try:
            yield self._taken
        finally:
            self._loss = self._targets = None
