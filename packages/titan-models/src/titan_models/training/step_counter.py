"""What modules count over a step, right under whatever recomputes, accumulates or compiles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class StepCounter(nn.Module):
    """Adds up numbers once a micro-batch: in the backward, as the gradient of a leaf. It has the role `step_counter`.

    What recomputation repeats in the forward counts once, what an evaluation sees not at all, and a step that is not
    made is forgotten with its gradients. n numbers.
    """

    leaf: Tensor

    def __init__(
        self, size: int, *, update: Callable[[Tensor], None], metrics: Callable[[Tensor], Mapping[str, float]]
    ) -> None:
        """`update` acts on what all ranks counted in a step, `[n]`, after the optimizer did, alike on every rank.

        `metrics` gives what is worth telling about that, by name, from numbers on the CPU; of several statistics the
        highest is told.
        """
        super().__init__()
        self.update = update
        self.metrics = metrics
        self.register_buffer("leaf", torch.zeros(size, dtype=torch.float64, requires_grad=True), persistent=False)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        """`x` as it is, and the smaller the better: it costs an addition. Its backward adds `numbers`, `[n]`."""
        # An addition joins leaf and stream: zero-bubble pipelines begin a part of the backward there, which torch 2.11
        # cannot do at a function written in Python.
        zero: Tensor = _Counted.apply(self.leaf, numbers)
        return x + zero.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.leaf is not None:  # None: another rank's
            self.leaf = self.leaf.detach().to(torch.float64).requires_grad_()
        return self


def after_step(model: nn.Module) -> dict[str, float]:
    """Let all modules act on what they counted since the last call, in one process; what they tell of it."""
    measured: list[tuple[str, float]] = []
    for module in model.modules():
        if isinstance(module, StepCounter):
            counted = torch.zeros_like(module.leaf) if module.leaf.grad is None else module.leaf.grad
            module.leaf.grad = None
            module.update(counted.detach())
            measured += module.metrics(counted.detach().cpu()).items()
    return {name: max(value for other, value in measured if other == name) for name, _ in measured}


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        return leaf.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        return numbers.to(torch.float64), None
