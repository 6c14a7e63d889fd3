"""Rotary position embedding (RoPE)."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from titan_config import Configurable
from torch import Tensor, nn


class RopeScaling(Configurable, abc.ABC):
    """A change of the RoPE frequencies that extends the context length."""

    @abc.abstractmethod
    def frequencies(self, theta: float, exponents: Tensor) -> Tensor:
        """Return the scaled frequencies in radians per token; the unscaled ones are `theta ** -exponents`."""

    def attention_factor(self) -> float:
        """Return the factor by which rotated features are multiplied."""
        return 1.0

    def softmax_factor(self) -> float:
        """Return the factor of the softmax scale, for attention that applies it (`MultiHeadLatentAttention`)."""
        return 1.0

    @abc.abstractmethod
    def hf_parameters(self) -> dict[str, Any]:
        """Return the `rope_parameters` of a Hugging Face config, except `rope_theta`."""


class Llama3Scaling(RopeScaling):
    """The RoPE scaling of Llama 3.1: low frequencies are divided by `factor`, high frequencies stay unchanged.

    A frequency is low if it makes fewer than `low_freq_factor` rotations in `original_max_seq_len` tokens, and high if
    it makes more than `high_freq_factor`. Frequencies between the two are interpolated linearly.
    """

    class Config(RopeScaling.Config):
        factor: float
        """Divisor of low frequencies."""

        low_freq_factor: float = 1.0
        """Rotations in `original_max_seq_len` tokens below which a frequency is low."""

        high_freq_factor: float = 4.0
        """Rotations in `original_max_seq_len` tokens above which a frequency is high."""

        original_max_seq_len: int = 8192
        """Context length before the extension, in tokens."""

        def validate(self) -> None:
            if not self.factor >= 1:  # nan is not
                raise ValueError(f"RoPE scaling factor must be >= 1, got {self.factor}.")
            if not 0 < self.low_freq_factor <= self.high_freq_factor:
                raise ValueError(
                    f"low_freq_factor must be above 0 and at most high_freq_factor ({self.high_freq_factor}), got "
                    f"{self.low_freq_factor}."
                )
            if self.original_max_seq_len < 1:
                raise ValueError(f"original_max_seq_len must be at least 1, got {self.original_max_seq_len}.")

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
    """Rotation angles of positions (Su et al., 2021). B batch, T tokens, K rotary features of a head.

    The frequencies are no buffer, since they follow from the config; they are fp32, as in the released models.
    """

    class Config(Configurable.Config):
        dim: int
        """Number of rotary features of a head."""

        theta: float = 500_000.0
        """Base of the wavelengths (rope_theta): the longest is about 2 pi theta tokens."""

        scaling: RopeScaling.Config | None = None
        """The scaling of the frequencies for a longer context. None: no scaling."""

        def validate(self) -> None:
            if self.dim < 2 or self.dim % 2:
                raise ValueError(f"Rope dim must be even and above 0, since features rotate in pairs, got {self.dim}.")
            if not self.theta > 1:
                raise ValueError(f"Rope theta must be > 1, got {self.theta}.")

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

        Both are multiplied by the attention factor of the scaling, which therefore multiplies the rotated features.
        """
        precision = torch.promote_types(dtype, torch.float32)
        frequencies = self.frequencies.to(positions.device, precision, non_blocking=True)
        angles = positions[..., None, None].to(precision) * frequencies
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the features of `x [B, T, H, K]` by the angles whose cosines and sines are `[B, T, 1, K/2]`.

    Feature i forms a pair with i + K/2. Products have the dtype of `cos`; the result is rounded once, to that of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as `rotate` does, with feature 2i paired with 2i + 1."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
