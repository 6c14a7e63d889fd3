"""Per-step counters of modules, exact under activation checkpointing, gradient accumulation and compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class StepCounter(nn.Module):
    """Sums numbers over the micro-batches of a step. Its role is `step_counter`. n numbers.

    The numbers accumulate in the backward, as the gradient of a leaf. A forward that is recomputed therefore counts
    once, an evaluation does not count, and the counts of a discarded step are dropped with its gradients.
    """

    leaf: Tensor

    def __init__(
        self, size: int, *, update: Callable[[Tensor], None], metrics: Callable[[Tensor], Mapping[str, float]]
    ) -> None:
        """Count `size` numbers.

        After the optimizer step, `update` is called on each rank with the counts of all ranks, `[n]`. `metrics` is
        called with these counts on the CPU and returns metrics by name; over modules, the maximum is reported.
        """
        super().__init__()
        self.update = update
        self.metrics = metrics
        self.register_buffer("leaf", torch.zeros(size, dtype=torch.float64, requires_grad=True), persistent=False)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Return `x`, unchanged in value. The backward adds `numbers [n]`.

        It costs one elementwise addition, so pass a small tensor as `x`.
        """
        # The leaf joins the graph by an addition: zero-bubble pipelines split the backward at this node, and torch 2.11
        # cannot split it at a custom autograd function.
        zero: Tensor = _AddToGradient.apply(self.leaf, numbers)
        return x + zero.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.leaf is not None:  # None: on another rank
            self.leaf = self.leaf.detach().to(torch.float64).requires_grad_()
        return self


def after_step(model: nn.Module) -> dict[str, float]:
    """Update all modules with their counts since the last call, in a single process, and return their metrics."""
    metrics: list[tuple[str, float]] = []
    for module in model.modules():
        if isinstance(module, StepCounter):
            counts = torch.zeros_like(module.leaf) if module.leaf.grad is None else module.leaf.grad
            module.leaf.grad = None
            module.update(counts.detach())
            metrics += module.metrics(counts.detach().cpu()).items()
    return {name: max(value for other, value in metrics if other == name) for name, _ in metrics}


class _AddToGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        return leaf.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        return numbers.to(torch.float64), None
