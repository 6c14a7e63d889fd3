"""Auxiliary losses of modules, such as the load balancing loss of a router, scaled like the loss of the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from titan_parallel.sharding_plan.roles import Roles


class AuxiliaryLoss(Protocol):
    """A module with the role `auxiliary_loss`: it adds gradients of a sum over its tokens, times `scale * share`."""

    scale: Tensor | None
    """The factor of the loss sum in the gradients, 1 / denominator, a scalar; None between steps."""
    share: float
    """This rank's share of the sum: 1, or less where other ranks have the same tokens."""


class AuxiliaryLosses:
    """All auxiliary losses of a model.

    In a region every rank of the tensor axis computes the loss of the same tokens, and gradients are summed over these
    ranks, so each rank contributes a share.
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
        """Divide auxiliary losses by `denominator` in backwards within the context, as the loss of the head is."""
        if self._modules:
            scale = 1 / torch.as_tensor(denominator, dtype=torch.float64, device=self._device_type)
            for module in self._modules:
                module.scale = scale
        try:
            yield
        finally:
            for module in self._modules:
                module.scale = None
