"""The gated feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from titan_models.feed_forward import FeedForward
from titan_models.linear import Linear
from titan_models.roles import Roles


class SwiGLU(FeedForward):
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020): `[..., D] -> [..., D]`."""

    class Config(FeedForward.Config):
        hidden_dim: int
        """Width between the projections."""

        input: Linear.Config = Linear.Config()
        """The two projections in: gate and up."""

        output: Linear.Config = Linear.Config()
        """The projection back."""

        def validate(self) -> None:
            if self.hidden_dim < 1:
                raise ValueError(f"Got hidden_dim {self.hidden_dim}. A layer has a width. Set it to 1 or more.")

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.gate_proj: Linear = config.input.build(in_features=dim, out_features=config.hidden_dim)
        self.up_proj: Linear = config.input.build(in_features=dim, out_features=config.hidden_dim)
        self.down_proj: Linear = config.output.build(in_features=config.hidden_dim, out_features=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def roles(self) -> Roles:
        return {"": "region", "gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
