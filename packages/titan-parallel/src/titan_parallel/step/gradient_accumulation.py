"""The order of micro-batches in a step, and gradient accumulation: one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.forward_loss import LossForward

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

GradientHook = Callable[[Tensor], None]


class Schedule(Protocol):
    """The order in which the micro-batches of a step run.

    Sums are fp64 and of this rank alone, zero on ranks that do not compute the loss.
    """

    def check(self, batches: Sequence[Batch]) -> None:
        """Raise ValueError for batches that cannot be the micro-batches of a step. Not a collective."""

    def must_probe(self, batches: Sequence[Batch]) -> bool:
        """Return whether `probe_shapes` must be called before a step with these batches: on every rank, if on any."""

    def probe_shapes(self, batches: Sequence[Batch]) -> None:
        """Find the shapes that stages exchange for these batches. Every rank calls it with as many batches."""

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, denominator: float | Tensor) -> Tensor:
        """Add gradients of loss sum / `denominator`, summed over data and context ranks, and return the loss sum."""

    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> Tensor:
        """Return `[loss sum, count]`, fp64."""

    def set_gradient_hook(self, hook: GradientHook) -> None:
        """Call `hook` on each gradient, or bucket of gradients, once it is summed."""


class GradientAccumulation:
    """Forward and backward of one micro-batch after the other; the last one sums gradients over replicas."""

    def __init__(self, forward: LossForward, units: Sequence[FSDPModule], *, reduces_each: bool) -> None:
        """`reduces_each`: reduce-scatter after every micro-batch, so that a rank keeps gradients of its shard alone."""
        self._forward = forward
        self._units = units
        self._reduces_each = reduces_each
        self._gradient_hook: GradientHook | None = None

    def check(self, batches: Sequence[Batch]) -> None:
        """Accept any batches."""

    def must_probe(self, batches: Sequence[Batch]) -> bool:
        return False

    def probe_shapes(self, batches: Sequence[Batch]) -> None:
        """Do nothing: no stage exchanges shapes."""

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, denominator: float | Tensor) -> Tensor:
        sums = []
        for index, batch in enumerate(batches):
            with self._synchronized(index == len(batches) - 1):
                loss_sum, _ = self._forward(batch, loss)
                (loss_sum / denominator).backward()
            sums.append(loss_sum.detach().to(torch.float64))
        return torch.stack(sums).sum()

    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> Tensor:
        totals = [torch.stack([total.to(torch.float64) for total in self._forward(batch, loss)]) for batch in batches]
        for unit in self._units:
            unit.reshard()  # weights gathered here must not outlive a change of the weights
        return torch.stack(totals).sum(0)

    def set_gradient_hook(self, hook: GradientHook) -> None:
        self._gradient_hook = hook
        for unit in self._units:
            unit.set_all_reduce_hook(hook)

    @contextmanager
    def _synchronized(self, is_last: bool) -> Iterator[None]:
        """Let the backward within sum gradients over data ranks, and call the gradient hook on the sums."""
        self._set_sums(each=is_last or self._reduces_each, over_replicas=is_last)
        handles = []
        if is_last and self._gradient_hook is not None and not self._units:
            hook = self._gradient_hook
            for parameter in self._forward.model.parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(lambda p: hook(p.grad)))
        try:
            yield
        finally:
            self._set_sums(each=True, over_replicas=True)  # FSDP's defaults, for custom training loops
            for handle in handles:
                handle.remove()

    def _set_sums(self, *, each: bool, over_replicas: bool) -> None:
        for unit in self._units:
            unit.set_requires_gradient_sync(each, recurse=False)
            unit.set_requires_all_reduce(over_replicas, recurse=False)
