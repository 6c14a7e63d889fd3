"""YaRN: rotary positions for longer sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from titan_models.layers.rope import RopeScaling


class Yarn(RopeScaling):
    """Slow frequencies are divided by `factor`, fast ones stay, and attention gets sharper (Peng et al., 2023).

    Between the pairs of features that turn `beta_fast` and `beta_slow` times in the original length, frequencies go
    over linearly in the number of the pair; where both are equal, there is a step. How much sharper, `m(mscale) = 0.1
    mscale ln(factor) + 1` says: rotated features are multiplied by `attention_factor()`, and DeepSeek's attention its
    softmax scale by `softmax_factor()`.
    """

    class Config(RopeScaling.Config):
        factor: float
        """What slow frequencies are divided by."""

        beta_fast: float = 32.0
        """Turns in the original length above which a frequency is fast."""

        beta_slow: float = 1.0
        """Turns in the original length below which a frequency is slow."""

        original_max_seq_len: int = 4096
        """Tokens, the length before the extension."""

        truncate: bool = True
        """The two bounds between the fast and the slow are whole numbers of pairs."""

        mscale: float | None = None
        """With `mscale_all_dim`: rotated features are multiplied by m(mscale) / m(mscale_all_dim), not by m(1)."""

        mscale_all_dim: float | None = None
        """DeepSeek's softmax scale is multiplied by m(mscale_all_dim)^2. None: it is not."""

        attention_factor: float | None = None
        """What rotated features are multiplied by, whatever the others say. None: what follows from them."""

        def validate(self) -> None:
            if not self.factor >= 1:  # nan is not
                raise ValueError(f"Got factor {self.factor}. Sequences get longer by it. Set it to 1 or more.")
            if not 0 < self.beta_slow <= self.beta_fast:
                raise ValueError(
                    f"beta_slow must be above 0 and at most beta_fast ({self.beta_fast}), got {self.beta_slow}. Most "
                    "models have 1 and 32, Kimi K2 has 1 and 1."
                )
            if self.original_max_seq_len < 1:
                raise ValueError(
                    f"Got original_max_seq_len {self.original_max_seq_len}. It is a length. Set it to 4096, say."
                )
            for name in ("mscale", "mscale_all_dim", "attention_factor"):
                value = getattr(self, name)
                if value is not None and not value > 0:
                    raise ValueError(f"Got {name} {value}. It is above 0. Set it to 1, say, or to None.")

    def __init__(self, config: Config) -> None:
        self.config = config

    def frequencies(self, theta: float, exponents: Tensor) -> Tensor:
        c = self.config
        first_slower = self._pair_that_turns(c.beta_fast, theta, len(exponents))
        last_faster = self._pair_that_turns(c.beta_slow, theta, len(exponents))
        if c.truncate:
            first_slower, last_faster = math.floor(first_slower), math.ceil(last_faster)
        first_slower, last_faster = max(first_slower, 0), min(last_faster, 2 * len(exponents) - 1)
        if first_slower == last_faster:  # a step, as transformers computes it
            last_faster += 0.001
        pairs = torch.arange(len(exponents), dtype=exponents.dtype, device=exponents.device)
        fast = 1 - ((pairs - first_slower) / (last_faster - first_slower)).clamp(0, 1)
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

    def _pair_that_turns(self, turns: float, theta: float, num_pairs: int) -> float:
        """The number, with a fraction, of the pair that turns so often in the original length."""
        return num_pairs * math.log(self.config.original_max_seq_len / (2 * math.pi * turns)) / math.log(theta)
