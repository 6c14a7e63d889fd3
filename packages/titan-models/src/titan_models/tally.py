"""What modules count over a step, right under whatever recomputes, accumulates or compiles them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class Tallying(abc.ABC):
    """A module with the role `tally`: it counts over a step, and acts on the counts of all ranks after it."""

    @property
    @abc.abstractmethod
    def tally(self) -> Tensor | None:
        """A leaf whose gradient is what was counted, `[n]`; see `Tally`. None: the module is another rank's."""

    @abc.abstractmethod
    def settle(self, counted: Tensor) -> None:
        """Act on what all ranks counted in a step, `[n]`, after the optimizer did: the same on every rank."""

    @abc.abstractmethod
    def measure(self, counted: Tensor) -> Mapping[str, float]:
        """What is worth telling about it, by name: `counted` is on the CPU. Of several modules the highest is told."""


class Tally(nn.Module):
    """Adds up numbers once a micro-batch: in the backward, as the gradient of a leaf.

    What recomputation repeats in the forward counts once, what an evaluation sees not at all, and a step that is not
    made is forgotten with its gradients. n numbers.
    """

    leaf: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("leaf", torch.zeros(size, dtype=torch.float64, requires_grad=True), persistent=False)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        """`x` as it is, and the smaller the better: it costs an addition. Its backward adds `numbers`, `[n]`."""
        # An addition joins leaf and stream: zero-bubble pipelines begin a part of the backward there, which torch 2.11
        # cannot do at a function written in Python.
        zero: Tensor = _Tallied.apply(self.leaf, numbers)
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
        if isinstance(module, Tallying) and (leaf := module.tally) is not None:
            counted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = None
            module.settle(counted.detach())
            measured += module.measure(counted.detach().cpu()).items()
    return {name: max(value for other, value in measured if other == name) for name, _ in measured}


class _Tallied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        return leaf.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        return numbers.to(torch.float64), None
