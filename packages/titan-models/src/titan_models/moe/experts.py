"""The experts of an MoE layer."""

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
    """All experts of an MoE layer, applied to tokens sorted by expert. Expert parallelism dispatches tokens here.

    Built with `dim`, `num_experts` and `top_k`. N tokens, D width, E experts, F width of an expert.
    """

    @abc.abstractmethod
    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Return the outputs `[N, D]`: the first `counts[0]` rows of `x` belong to expert 0, the next to expert 1.

        Rows beyond the sum of the counts are padding: their outputs and gradients are zero, whatever they contain.
        """

    def roles(self) -> Roles:
        """Return the roles that shard the features of each expert over tensor-parallel ranks. Empty: replicated."""
        return {}


class SwiGLUExperts(Experts):
    """Gated experts, `down(gating(gate(x), up(x)))`; with the default gating each is a `SwiGLU`."""

    class Config(Experts.Config):
        hidden_dim: int
        """Width of an expert (moe_intermediate_size)."""

        gating: Gating.Config = SiluGating.Config()
        """The function of the gate and up projections."""

        kernel: Kernel.Config = GroupedMM.Config()
        """The kernel of the grouped matrix products."""

        gate_init: Initializer.Config = Normal.Config()
        """The initializer of the weights of the gate projections."""

        up_init: Initializer.Config = Normal.Config()
        """The initializer of the weights of the up projections."""

        down_init: Initializer.Config = Normal.Config()
        """The initializer of the weights of the down projections."""

        bias_init: Initializer.Config | None = None
        """The initializer of the biases of all three projections. None: no biases."""

        def validate(self) -> None:
            if self.hidden_dim < 1:
                raise ValueError(f"SwiGLUExperts hidden_dim must be at least 1, got {self.hidden_dim}.")

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
        is_token_N1 = (torch.arange(len(x_ND), device=x_ND.device) < counts_E.sum()).unsqueeze(1)
        x_ND = x_ND.where(is_token_N1, 0)  # zeroes the gradients of padding too
        hidden_NF = self.gating(self.gate_proj(x_ND, counts_E), self.up_proj(x_ND, counts_E))
        return self.down_proj(hidden_NF, counts_E).where(is_token_N1, 0)

    def roles(self) -> Roles:
        return {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
