"""The experts of a layer."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import Tensor, nn

from titan_models.initialization.initializers import Initializer, Normal
from titan_models.layers.roles import Roles
from titan_models.moe.gating import Gating, SiluGating
from titan_models.moe.grouped_linear import GroupedLinear
from titan_models.moe.kernels import GroupedMM, Kernel


class Experts(Configurable, nn.Module, abc.ABC):
    """All experts of a layer, and nothing of who chose them: where tokens are brought to experts on other ranks.

    Built with `dim`, `num_experts` and `top_k`. N tokens, D width, E experts, F width of an expert.
    """

    @abc.abstractmethod
    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What experts make of tokens, `[N, D]`: the first `counts[0]` rows are expert 0's, the next expert 1's.

        Rows beyond all counts belong to nobody: they give zeros, and have zeros as gradients, whatever is in them.
        """

    def roles(self) -> Roles:
        """How each expert's features are split over tensor ranks. None: experts are whole on each of them."""
        return {}


class SwiGLUExperts(Experts):
    """Each expert is a gated layer: `down(gating(gate(x), up(x)))`. With the gating that there is, a `SwiGLU`."""

    class Config(Experts.Config):
        hidden_dim: int
        """Width of an expert."""

        gating: Gating.Config = SiluGating.Config()
        """What is made of the two projections in."""

        kernel: Kernel.Config = GroupedMM.Config()
        """How the products with each expert's matrix are computed."""

        gate_init: Initializer.Config = Normal.Config()
        """How the weights of the gate projections are drawn."""

        up_init: Initializer.Config = Normal.Config()
        """How the weights of the up projections are drawn."""

        down_init: Initializer.Config = Normal.Config()
        """How the weights of the down projections are drawn."""

        bias_init: Initializer.Config | None = None
        """How the biases of all three projections are drawn. None: there are none."""

        def validate(self) -> None:
            if self.hidden_dim < 1:
                raise ValueError(f"Got hidden_dim {self.hidden_dim}. An expert has a width. Set it to 1 or more.")

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int) -> None:
        nn.Module.__init__(self)

        def projection(in_features: int, out_features: int, weight_init: Initializer.Config) -> GroupedLinear:
            linear = GroupedLinear.Config(weight_init=weight_init, bias_init=config.bias_init, kernel=config.kernel)
            sizes = {"in_features": in_features, "out_features": out_features}
            built: GroupedLinear = linear.build(num_experts=num_experts, top_k=top_k, **sizes)
            return built

        self.gate_proj = projection(dim, config.hidden_dim, config.gate_init)
        self.up_proj = projection(dim, config.hidden_dim, config.up_init)
        self.down_proj = projection(config.hidden_dim, dim, config.down_init)
        self.gating: Gating = config.gating.build()

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        owned_N1 = (torch.arange(len(x_ND), device=x_ND.device) < counts_E.sum()).unsqueeze(1)
        x_ND = x_ND.where(owned_N1, 0)  # and so its gradient
        hidden_NF = self.gating(self.gate_proj(x_ND, counts_E), self.up_proj(x_ND, counts_E))
        return self.down_proj(hidden_NF, counts_E).where(owned_N1, 0)

    def roles(self) -> Roles:
        return {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
