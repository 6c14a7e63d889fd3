"""Losses that parts of a model have of their own: what they weigh beside the loss at the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from titan_parallel.roles import Roles


class OwnLoss(Protocol):
    """What a module with the role `own_loss` offers: it adds the gradients of a sum over its tokens times `scale`."""

    scale: Tensor | None
    """What a unit of the head's loss sum weighs in the gradients, a scalar; None between steps."""


class OwnLosses:
    """All losses that a model has of its own."""

    def __init__(self, model: nn.Module, roles: Roles, device_type: str) -> None:
        self._modules = [cast(OwnLoss, model.get_submodule(name)) for name in roles.named("own_loss")]
        self._device_type = device_type

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
