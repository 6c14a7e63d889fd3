"""Attention that stays sharp over long pasts."""

from __future__ import annotations

import torch
from titan_config import Configurable
from torch import Tensor


class Temperature(Configurable):
    """Scales queries by `1 + strength * log(1 + floor((position + 1) / step))`, as Llama 4 does where nothing rotates.

    A softmax over more keys is flatter; larger queries sharpen it (Nakanishi, "Scalable-softmax", 2025). Positions are
    those of a token's own document. B batch, T tokens, H heads, K features of a head.
    """

    class Config(Configurable.Config):
        step: int = 8192
        """Positions that share a scale; it is 1 for the first of them."""

        strength: float = 0.1
        """How fast queries grow."""

        def validate(self) -> None:
            if self.step < 1:
                raise ValueError(f"Got step {self.step}. It counts positions. Set it to 1 or more.")
            if not self.strength > 0:  # nan is not
                raise ValueError(
                    f"Got strength {self.strength}. Queries grow by it. Set it above 0, or temperature to None."
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, q_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """The queries, scaled in fp32 or wider."""
        steps = (positions_BT + 1) // self.config.step
        scales_BT = 1 + self.config.strength * steps.to(torch.promote_types(q_BTHK.dtype, torch.float32)).log1p()
        return (q_BTHK * scales_BT[..., None, None]).to(q_BTHK.dtype)
