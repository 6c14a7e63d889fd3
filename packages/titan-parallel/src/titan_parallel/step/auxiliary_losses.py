"""Losses that parts of a model have of their own: what they weigh beside the loss at the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from titan_parallel.sharding_plan.roles import Roles


class AuxiliaryLoss(Protocol):
    """What a module with the role `auxiliary_loss` offers: gradients of a sum over its tokens, times `scale` and `share`."""

    scale: Tensor | None
    """What a unit of the head's loss sum weighs in the gradients, a scalar; None between steps."""
    share: float
    """The part of the sum that this rank gives: 1, but where others have the same tokens."""


class AuxiliaryLosses:
    """All losses that a model has of its own.

    In a region every rank of the tensor axis computes them, of the same tokens, and gradients there are shares that are
    summed: each gives its part of them.
    """

    def __init__(self, model: nn.Module, roles: Roles, *, tp_size: int, device_type: str) -> None:
        self._modules = []
        self._device_type = device_type
        for name in roles.named("auxiliary_loss"):
            module = cast(AuxiliaryLoss, model.get_submodule(name))
            module.share = 1.0 if roles.region_of(name) is None else 1 / tp_size
            self._modules.append(module)

    @contextmanager
    def divided_by(self, denominator: float | Tensor) -> Iterator[None]:
        """Within it the backward divides their sums by `denominator`, as it does that of the head."""
        if self._modules:
            scale = 1 / torch.as_tensor(denominator, dtype=torch.float64, device=self._device_type)
            for module in self._modules:
                module.scale = scale
        try:
            yield
        finally:
            for module in self._modules:
                module.scale = None
