"""YaRN context extension of RoPE."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from titan_models.layers.rope import RopeScaling


class Yarn(RopeScaling):
    """YaRN (Peng et al., 2023): low frequencies are divided by `factor`, high ones stay, and attention gets sharper.

    Between the feature pairs that make `beta_fast` and `beta_slow` rotations in `original_max_seq_len` tokens, the
    frequencies are interpolated linearly in the pair number; if both are equal, there is a step. Sharpness follows from
    `m(mscale) = 0.1 mscale ln(factor) + 1`: rotated features are multiplied by `attention_factor()`, and the softmax
    scale of `MultiHeadLatentAttention` by `softmax_factor()`.
    """

    class Config(RopeScaling.Config):
        factor: float
        """Divisor of low frequencies."""

        beta_fast: float = 32.0
        """Rotations in `original_max_seq_len` tokens above which a frequency is high."""

        beta_slow: float = 1.0
        """Rotations in `original_max_seq_len` tokens below which a frequency is low."""

        original_max_seq_len: int = 4096
        """Context length before the extension, in tokens."""

        truncate: bool = True
        """Round the bounds of the interpolation outwards to whole pair numbers."""

        mscale: float | None = None
        """Rotated features are multiplied by m(mscale) / m(mscale_all_dim) if both are set, else by m(1)."""

        mscale_all_dim: float | None = None
        """The softmax scale of `MultiHeadLatentAttention` is multiplied by m(mscale_all_dim)^2. None: by 1."""

        attention_factor: float | None = None
        """Factor of rotated features. None: the factor that follows from `mscale` and `mscale_all_dim`."""

        def validate(self) -> None:
            if not self.factor >= 1:  # nan is not
                raise ValueError(f"RoPE scaling factor must be >= 1, got {self.factor}.")
            if not 0 < self.beta_slow <= self.beta_fast:
                raise ValueError(
                    f"beta_slow must be above 0 and at most beta_fast ({self.beta_fast}), got {self.beta_slow}. Most "
                    "models use beta_slow 1 and beta_fast 32; Kimi K2 uses 1 and 1."
                )
            if self.original_max_seq_len < 1:
                raise ValueError(f"original_max_seq_len must be at least 1, got {self.original_max_seq_len}.")
            for name in ("mscale", "mscale_all_dim", "attention_factor"):
                value = getattr(self, name)
                if value is not None and not value > 0:
                    raise ValueError(f"{name} must be > 0 or None, got {value}.")

    def __init__(self, config: Config) -> None:
        self.config = config

    def frequencies(self, theta: float, exponents: Tensor) -> Tensor:
        c = self.config
        low = self._pair_with_rotations(c.beta_fast, theta, len(exponents))
        high = self._pair_with_rotations(c.beta_slow, theta, len(exponents))
        if c.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(exponents) - 1)
        if low == high:  # a step, as transformers computes it
            high += 0.001
        pairs = torch.arange(len(exponents), dtype=exponents.dtype, device=exponents.device)
        fast = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
        periods = theta**exponents
        return 1.0 / (c.factor * periods) * (1 - fast) + 1.0 / periods * fast

    def attention_factor(self) -> float:
        c = self.config
        if c.attention_factor is not None:
            return c.attention_factor
        if c.mscale is not None and c.mscale_all_dim is not None:
            return self._m(c.mscale) / self._m(c.mscale_all_dim)
        return self._m(1.0)

    def softmax_factor(self) -> float:
        return 1.0 if self.config.mscale_all_dim is None else self._m(self.config.mscale_all_dim) ** 2

    def hf_parameters(self) -> dict[str, Any]:
        c = self.config
        optional = {name: getattr(c, name) for name in ("mscale", "mscale_all_dim", "attention_factor")}
        return {
            "rope_type": "yarn",
            "factor": c.factor,
            "beta_fast": c.beta_fast,
            "beta_slow": c.beta_slow,
            "original_max_position_embeddings": c.original_max_seq_len,
            "truncate": c.truncate,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _m(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.config.factor) + 1.0

    def _pair_with_rotations(self, rotations: float, theta: float, num_pairs: int) -> float:
        """Return the (fractional) number of the pair with `rotations` rotations in `original_max_seq_len` tokens."""
        return num_pairs * math.log(self.config.original_max_seq_len / (2 * math.pi * rotations)) / math.log(theta)
