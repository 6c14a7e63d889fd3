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
    """All losses that a model has of its own.

    In a region every rank of the tensor axis computes them, of the same tokens, and gradients there are shares that are
    summed: each gives its part of them.
    """

    def __init__(self, model: nn.Module, roles: Roles, *, num_tensor: int, device_type: str) -> None:
        names = roles.named("own_loss")
        self._modules = [cast(OwnLoss, model.get_submodule(name)) for name in names]
        self._parts = [1 / num_tensor if roles.region_of(name) is not None else 1.0 for name in names]
        self._device_type = device_type

    def scale_by(self, scale: float | Tensor) -> None:
        """From now on their sums weigh `scale` in the gradients, over all ranks of the tensor axis together."""
        if self._modules:
            scale = torch.as_tensor(scale, dtype=torch.float64, device=self._device_type)
            for module, part in zip(self._modules, self._parts, strict=True):
                module.scale = scale * part

    @contextmanager
    def divided_by(self, denominator: float | Tensor) -> Iterator[None]:
        """Within it the backward divides their sums by `denominator`, as it does that of the head."""
        if self._modules:
            self.scale_by(1 / torch.as_tensor(denominator, dtype=torch.float64))
        try:
            yield
        finally:
            for module in self._modules:
                module.scale = None
