"""Auxiliary losses: losses computed inside a model, whose gradients add to those of the loss at the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AuxiliaryLoss(nn.Module):
    """A loss that is added to the loss at the head: (loss sum at the head + auxiliary loss sums) / denominator.

    Its role is `auxiliary_loss`. Auxiliary losses are sums over tokens, so that they depend on neither the mesh nor the
    micro-batches. `scale` is the factor of a loss sum in the gradients, usually 1 / denominator; the training engine or
    `scale_auxiliary_losses` sets it. `share` is the fraction of the sum that this rank contributes; the training engine
    sets it where several ranks compute the loss of the same tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor | None = None
        self.share = 1.0

    def forward(self, x: Tensor, loss_sum: Tensor) -> Tensor:
        """Return `x` unchanged. The backward adds the gradients of the scalar `loss_sum` times `scale * share`."""
        if self.scale is None:
            raise RuntimeError(
                "The scale of auxiliary losses must be set before the forward. Call model.scale_auxiliary_losses(1 / "
                "denominator) with the denominator of the loss sum at the head, or use forward_backward of "
                "titan_parallel, which sets it."
            )
        output: Tensor = _WithLoss.apply(x, loss_sum, self.scale * self.share)
        return output


def scale_auxiliary_losses(model: nn.Module, scale: float) -> None:
    """Set the factor of the loss sums of all auxiliary losses in `model`, usually 1 / denominator."""
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
