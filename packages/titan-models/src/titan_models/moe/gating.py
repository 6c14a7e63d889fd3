"""Gating functions of experts."""

from __future__ import annotations

import abc

from titan_config import Configurable
from torch import Tensor
from torch.nn import functional


class Gating(Configurable, abc.ABC):
    """An elementwise function of the outputs of the gate and up projections."""

    def __init__(self, config: Configurable.Config) -> None:
        pass

    @abc.abstractmethod
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the input of the down projection, of the shape of `gate` and `up`."""


class SiluGating(Gating):
    """`silu(gate) * up` (Shazeer, 2020)."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up


class ClampedGating(Gating):
    """`gate * sigmoid(alpha * gate) * (up + 1)`, with `gate` clamped to at most `limit`, and `up` to
    `[-limit, limit]`.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b model card" (2025), and the code released with it.
    """

    class Config(Gating.Config):
        alpha: float = 1.702
        """Steepness of the gate; 1.702 approximates GELU (swiglu_alpha)."""

        limit: float = 7.0
        """Bound to which both projections are clamped (swiglu_limit)."""

        def validate(self) -> None:
            if not self.alpha > 0:  # nan is not
                raise ValueError(f"ClampedGating alpha must be > 0, got {self.alpha}.")
            if not self.limit > 0:
                raise ValueError(f"ClampedGating limit must be > 0, got {self.limit}.")

    def __init__(self, config: Config) -> None:
        self.alpha, self.limit = config.alpha, config.limit

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        return gate * (self.alpha * gate).sigmoid() * (up.clamp(-self.limit, self.limit) + 1)
