"""What gated experts make of their two projections, number by number."""

from __future__ import annotations

import abc

from titan_config import Configurable
from torch import Tensor
from torch.nn import functional


class Gating(Configurable, abc.ABC):
    """A function of `gate` and `up`, two tensors of one shape, to a third."""

    def __init__(self, config: Configurable.Config) -> None:
        pass

    @abc.abstractmethod
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the projection back is given."""


class SiluGating(Gating):
    """`silu(gate) * up` (Shazeer, 2020)."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up


class ClampedGating(Gating):
    """`gate * sigmoid(alpha * gate) * (up + 1)`, with `gate` up to `limit`, and `up` from `-limit` to `limit`.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b model card" (2025), and the code released with it.
    """

    class Config(Gating.Config):
        alpha: float = 1.702
        """How steep the gate is; 1.702 makes it close to a GELU."""

        limit: float = 7.0
        """What both projections are clamped to."""

        def validate(self) -> None:
            if not self.alpha > 0:  # nan is not
                raise ValueError(f"Got alpha {self.alpha}. The gate opens with its argument. Set it above 0.")
            if not self.limit > 0:
                raise ValueError(f"Got limit {self.limit}. Nothing would pass. Set it above 0, such as 7.")

    def __init__(self, config: Config) -> None:
        self.alpha, self.limit = config.alpha, config.limit

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        return gate * (self.alpha * gate).sigmoid() * (up.clamp(-self.limit, self.limit) + 1)
