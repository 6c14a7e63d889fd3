"""Experts as 3-D weights."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_models.flops import Flops, matmul_flops
from titan_models.initializers import Initializer, TruncatedNormal
from titan_models.moe.gating import Gating, SiluGating
from titan_models.moe.kernels import GroupedMM, Kernel
from titan_models.part import Part, new_parameter


class Experts(Part, abc.ABC):
    """All experts of a layer, and nothing of who chose them: where tokens are brought to experts on other ranks.

    Built with `dim`, `num_experts` and `top_k`. N tokens, D width, E experts, F width of an expert.
    """

    @abc.abstractmethod
    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What experts make of tokens, `[N, D]`: the first `counts[0]` rows are expert 0's, the next expert 1's.

        Rows beyond all counts belong to nobody: they give zeros, and have zeros as gradients, whatever is in them.
        """


class SwiGLUExperts(Experts):
    """Each expert is a gated layer: `down(gating(gate(x), up(x)))`. With the gating that there is, a `SwiGLU`."""

    class Config(Experts.Config):
        hidden_dim: int
        """Width of an expert."""

        gating: Gating.Config = SiluGating.Config()
        """What is made of the two projections in."""

        kernel: Kernel.Config = GroupedMM.Config()
        """How the products with each expert's matrix are computed."""

        input_init: Initializer.Config = TruncatedNormal.Config(std=0.02)
        """How the two projections in are drawn: gate and up."""

        output_init: Initializer.Config = TruncatedNormal.Config(std=0.02)
        """How the projection back is drawn."""

        bias_init: Initializer.Config | None = None
        """How the biases of all three projections are drawn. None: there are none."""

        def validate(self) -> None:
            if self.hidden_dim < 1:
                raise ValueError(f"Got hidden_dim {self.hidden_dim}. An expert has a width. Set it to 1 or more.")

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int) -> None:
        nn.Module.__init__(self)
        self.gate_proj = new_parameter(num_experts, config.hidden_dim, dim)
        self.up_proj = new_parameter(num_experts, config.hidden_dim, dim)
        self.down_proj = new_parameter(num_experts, dim, config.hidden_dim)
        has_biases = config.bias_init is not None
        self.gate_bias = new_parameter(num_experts, config.hidden_dim) if has_biases else None
        self.up_bias = new_parameter(num_experts, config.hidden_dim) if has_biases else None
        self.down_bias = new_parameter(num_experts, dim) if has_biases else None
        self.config = config
        self.top_k = top_k
        self.gating: Gating = config.gating.build()
        self.kernel: Kernel = config.kernel.build()
        self.input_init: Initializer = config.input_init.build()
        self.output_init: Initializer = config.output_init.build()

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        owned_N1 = (torch.arange(len(x_ND), device=x_ND.device) < counts_E.sum()).unsqueeze(1)
        x_ND = x_ND.where(owned_N1, 0)  # and so its gradient
        gate_NF = self._project(x_ND, self.gate_proj, self.gate_bias, counts_E)
        up_NF = self._project(x_ND, self.up_proj, self.up_bias, counts_E)
        output_ND = self._project(self.gating(gate_NF, up_NF), self.down_proj, self.down_bias, counts_E)
        return output_ND.where(owned_N1, 0)

    def _project(self, x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts_E: Tensor) -> Tensor:
        y_NO = self.kernel(x_NI, weight_EOI, counts_E)
        return y_NO if bias_EO is None else y_NO + _of_rows(bias_EO, counts_E, len(y_NO))

    def initializers(self) -> dict[str, Initializer]:
        initializers = {"gate_proj": self.input_init, "up_proj": self.input_init, "down_proj": self.output_init}
        if self.config.bias_init is not None:
            bias_init: Initializer = self.config.bias_init.build()
            initializers |= dict.fromkeys(("gate_bias", "up_bias", "down_bias"), bias_init)
        return initializers

    def own_flops(self, seq_len: int) -> Flops:
        matrices = (self.gate_proj, self.up_proj, self.down_proj)
        return matmul_flops(self.top_k * sum(matrix[0].numel() for matrix in matrices))

    def own_idle_parameters(self) -> int:
        return sum((len(weight) - self.top_k) * weight[0].numel() for weight in self.parameters())


def _of_rows(bias_EO: Tensor, counts_E: Tensor, num_rows: int) -> Tensor:
    """The bias of each row's expert, `[N, O]`; for rows of nobody zeros, which drop what comes back."""
    expert_N = torch.searchsorted(counts_E.cumsum(0), torch.arange(num_rows, device=bias_EO.device), right=True)
    return functional.embedding(expert_N, functional.pad(bias_EO, (0, 0, 0, 1)))
