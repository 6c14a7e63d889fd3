"""The gated feed-forward layer (SwiGLU)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.linear import Linear
from titan_models.layers.roles import Roles


class SwiGLU(FeedForward):
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020): `[..., D] -> [..., D]`."""

    class Config(FeedForward.Config):
        hidden_dim: int
        """Width between the projections (intermediate_size)."""

        gate: Linear.Config = Linear.Config()
        """The gate projection."""

        up: Linear.Config = Linear.Config()
        """The up projection."""

        down: Linear.Config = Linear.Config()
        """The down projection."""

        def validate(self) -> None:
            if self.hidden_dim < 1:
                raise ValueError(f"SwiGLU hidden_dim must be at least 1, got {self.hidden_dim}.")

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.gate_proj: Linear = config.gate.build(in_features=dim, out_features=config.hidden_dim)
        self.up_proj: Linear = config.up.build(in_features=dim, out_features=config.hidden_dim)
        self.down_proj: Linear = config.down.build(in_features=config.hidden_dim, out_features=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def roles(self) -> Roles:
        return {"": "region", "gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
