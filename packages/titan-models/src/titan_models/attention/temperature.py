"""Attention temperature tuning for long contexts."""

from __future__ import annotations

import torch
from titan_config import Configurable
from torch import Tensor


class Temperature(Configurable):
    """Scaling of queries by `1 + strength * log(1 + floor((position + 1) / step))`, as in Llama 4's NoPE layers.

    A softmax over more keys is flatter; larger queries sharpen it (Nakanishi, "Scalable-softmax", 2025). Positions are
    relative to the start of the document. B batch, T tokens, H heads, K features of a head.
    """

    class Config(Configurable.Config):
        step: int = 8192
        """Number of consecutive positions with the same scale, which is 1 for the first ones (floor_scale)."""

        strength: float = 0.1
        """Factor of the logarithm (attn_scale)."""

        def validate(self) -> None:
            if self.step < 1:
                raise ValueError(f"Temperature step must be at least 1, got {self.step}.")
            if not self.strength > 0:  # nan is not
                raise ValueError(
                    f"Temperature strength must be > 0, got {self.strength}. To turn it off, set temperature to None."
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, q_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the scaled queries; the scaling is computed in fp32 or wider."""
        steps = (positions_BT + 1) // self.config.step
        scales_BT = 1 + self.config.strength * steps.to(torch.promote_types(q_BTHK.dtype, torch.float32)).log1p()
        return (q_BTHK * scales_BT[..., None, None]).to(q_BTHK.dtype)
