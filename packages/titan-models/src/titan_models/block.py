"""The pre-norm transformer block."""

from __future__ import annotations

from typing import Any

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.attention.base import Attention, RotaryPositions
from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles, under


class Block(Configurable, nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`: `[B, T, D] -> [B, T, D]`."""

    class Config(Configurable.Config):
        attention: Attention.Config
        feed_forward: FeedForward.Config
        norm: RMSNorm.Config = RMSNorm.Config()
        """The norms before attention and before the feed-forward layer."""

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.attention_norm: RMSNorm = config.norm.build(dim=dim)
        self.attention: Attention = config.attention.build(dim=dim)
        self.feed_forward_norm: RMSNorm = config.norm.build(dim=dim)
        self.feed_forward: FeedForward = config.feed_forward.build(dim=dim)

    def forward(self, x_BTD: Tensor, rotary: RotaryPositions, mask: Any) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, mask)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))

    def roles(self) -> Roles:
        return {
            "": "block",
            "attention_norm": "norm",
            **under("attention", self.attention.roles()),
            "feed_forward_norm": "norm",
            **under("feed_forward", self.feed_forward.roles()),
        }
