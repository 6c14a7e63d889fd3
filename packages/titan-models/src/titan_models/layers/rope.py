"""Rotary position embedding."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from titan_config import Configurable
from torch import Tensor, nn


class RopeScaling(Configurable, abc.ABC):
    """Changes the frequencies of a model so that it can read longer sequences than it was trained on."""

    @abc.abstractmethod
    def frequencies(self, theta: float, exponents: Tensor) -> Tensor:
        """The changed frequencies, radians per token, of the pairs that turn by `theta ** -exponents` without it."""

    def attention_factor(self) -> float:
        """What rotated features are multiplied by."""
        return 1.0

    def softmax_factor(self) -> float:
        """What an attention that asks for it, as DeepSeek's does, multiplies its softmax scale by."""
        return 1.0

    @abc.abstractmethod
    def hf_parameters(self) -> dict[str, Any]:
        """The scaling as `rope_parameters` of a Hugging Face config."""


class Llama3Scaling(RopeScaling):
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones stay, those between go over linearly.

    A frequency is slow when it turns less than `low_freq_factor` times in `original_max_seq_len` tokens, fast when it
    turns more than `high_freq_factor` times.
    """

    class Config(RopeScaling.Config):
        factor: float
        """What slow frequencies are divided by."""

        low_freq_factor: float = 1.0
        """Turns in the original length below which a frequency is slow."""

        high_freq_factor: float = 4.0
        """Turns in the original length above which a frequency is fast."""

        original_max_seq_len: int = 8192
        """Tokens, the length before the extension."""

        def validate(self) -> None:
            if not self.factor >= 1:  # nan is not
                raise ValueError(f"Got factor {self.factor}. Sequences get longer by it. Set it to 1 or more.")
            if not 0 < self.low_freq_factor <= self.high_freq_factor:
                raise ValueError(
                    f"Got low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}. The "
                    "frequencies between them are blended. Set them to 0 < low <= high, such as 1 and 4."
                )
            if self.original_max_seq_len < 1:
                raise ValueError(
                    f"Got original_max_seq_len {self.original_max_seq_len}. It is a length. Set it to 8192, say."
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    def frequencies(self, theta: float, exponents: Tensor) -> Tensor:
        c = self.config
        frequencies = 1.0 / theta**exponents
        turns = c.original_max_seq_len / (2 * math.pi / frequencies)
        if c.low_freq_factor == c.high_freq_factor:
            fast = (turns > c.low_freq_factor).to(frequencies.dtype)
        else:
            fast = ((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)).clamp(0, 1)
        return (1 - fast) * frequencies / c.factor + fast * frequencies

    def hf_parameters(self) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": self.config.factor,
            "low_freq_factor": self.config.low_freq_factor,
            "high_freq_factor": self.config.high_freq_factor,
            "original_max_position_embeddings": self.config.original_max_seq_len,
        }


class Rope(Configurable, nn.Module):
    """Angles of rotation from positions (Su et al., 2021).

    There are no buffers: the frequencies are a constant of the config, fp32 as the released models define them.
    B batch, T tokens, K features that rotate.
    """

    class Config(Configurable.Config):
        dim: int
        """Features of a head that rotate."""

        theta: float = 500_000.0
        """The slowest feature turns once in about 2 pi theta tokens."""

        scaling: RopeScaling.Config | None = None
        """How the frequencies are changed for long sequences."""

        def validate(self) -> None:
            if self.dim < 2 or self.dim % 2:
                raise ValueError(f"Got dim {self.dim}. Features rotate in pairs. Set it to an even number above 0.")
            if not self.theta > 1:
                raise ValueError(f"Got theta {self.theta}. It is the base of the wavelengths. Set it to 1e4, say.")

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        exponents = torch.arange(0, config.dim, 2, dtype=torch.float32, device="cpu") / config.dim
        self.frequencies = 1.0 / config.theta**exponents
        self.attention_factor = self.softmax_factor = 1.0
        if config.scaling is not None:
            scaling = config.scaling.build()
            self.frequencies = scaling.frequencies(config.theta, exponents)
            self.attention_factor, self.softmax_factor = scaling.attention_factor(), scaling.softmax_factor()

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[B, T, 1, K/2]` for `positions [B, T]` in fp32, or in `dtype` where that is wider.

        Both are multiplied by the scaling's attention factor, and so are the features that they rotate.
        """
        precision = torch.promote_types(dtype, torch.float32)
        frequencies = self.frequencies.to(positions.device, precision, non_blocking=True)
        angles = positions[..., None, None].to(precision) * frequencies
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the features of `x [B, T, H, K]` by the angles whose cosines and sines are `[B, T, 1, K/2]`.

    Feature i turns with i + K/2. The products are of the precision of `cos`, and rounded to that of `x` once.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`, but feature 2i turns with 2i + 1."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
