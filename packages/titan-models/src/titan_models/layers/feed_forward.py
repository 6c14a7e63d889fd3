"""The interface of feed-forward layers."""

from __future__ import annotations

import abc

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.layers.roles import Roles


class FeedForward(Configurable, nn.Module, abc.ABC):
    """The feed-forward layer of a block, which maps each token by itself: `SwiGLU`, `MoE`, or a custom one.

    Built with `dim`, the width of the hidden states.
    """

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map hidden states `[B, T, D]` to `[B, T, D]`."""

    @abc.abstractmethod
    def roles(self) -> Roles:
        """Return the role of each module; see `titan_models.layers.roles`."""
