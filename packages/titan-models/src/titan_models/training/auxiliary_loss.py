"""Losses of a model's own, computed deep within it, whose gradients join those of the loss at its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AuxiliaryLoss(nn.Module):
    """Adds a loss to the one at the head, with the role `auxiliary_loss`: (sum at the head + sums here) / denominator.

    Sums over tokens, so that neither the mesh nor the micro-batches change them. `scale` is what a unit of the head's
    loss sum weighs in the gradients, usually 1 / denominator; an engine sets it for each step, or `scale_auxiliary_losses`.
    `share` is the part of the sum that this rank gives: an engine sets it where other ranks have the same tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor | None = None
        self.share = 1.0

    def forward(self, x: Tensor, loss_sum: Tensor) -> Tensor:
        """`x` as it is. Its backward adds the gradients of `loss_sum`, a scalar, times `scale` and `share`."""
        if self.scale is None:
            raise RuntimeError(
                "Got a model with losses of its own, and nothing that says how they compare to that of the head. They "
                "are sums over tokens, divided by the same number. Call model.scale_auxiliary_losses(1 / denominator) before "
                "the forward, or titan_parallel's forward_backward, which does."
            )
        output: Tensor = _WithLoss.apply(x, loss_sum, self.scale * self.share)
        return output


def scale_auxiliary_losses(model: nn.Module, scale: float) -> None:
    """Set what a unit of loss weighs, for all losses that `model` has of its own."""
    for module in model.modules():
        if isinstance(module, AuxiliaryLoss):
            module.scale = torch.tensor(scale, dtype=torch.float64)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss_sum: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale.to(loss_sum))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient, scale, None
