"""What the second half of a block may be."""

from __future__ import annotations

import abc

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.layers.roles import Roles


class FeedForward(Configurable, nn.Module, abc.ABC):
    """Works on each token by itself; built with `dim`, the width of the stream. `SwiGLU`, `MoE`, or one of your own."""

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D] -> [B, T, D]`."""

    @abc.abstractmethod
    def roles(self) -> Roles:
        """What each part is; see `titan_models.layers.roles`."""
