"""Linear layers of all experts, as one stacked weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_models.initialization.initializers import Initializer, Normal
from titan_models.layers.flops import Flops, matmul_flops
from titan_models.layers.layer import Layer, new_parameter
from titan_models.moe.kernels import GroupedMM, Kernel


class GroupedLinear(Layer):
    """`y = x W_e^T + b_e` for the tokens of each expert `e`: weights `[E, O, I]`, biases `[E, O]`.

    Built with `num_experts`, `top_k`, `in_features` and `out_features`. N tokens, E experts, I features in, O features
    out.
    """

    class Config(Layer.Config):
        weight_init: Initializer.Config = Normal.Config()
        """The initializer of the weights."""

        bias_init: Initializer.Config | None = None
        """The initializer of the biases. None: no biases."""

        kernel: Kernel.Config = GroupedMM.Config()
        """The kernel of the grouped matrix products."""

    def __init__(self, config: Config, *, num_experts: int, top_k: int, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.top_k = top_k
        self.weight = new_parameter(num_experts, out_features, in_features)
        self.bias = None if config.bias_init is None else new_parameter(num_experts, out_features)
        self.kernel: Kernel = config.kernel.build()

    def forward(self, x_NI: Tensor, counts_E: Tensor) -> Tensor:
        """Return `[N, O]`: the first `counts[0]` rows belong to expert 0, and so on.

        Rows beyond the sum of the counts are undefined.
        """
        y_NO = self.kernel(x_NI, self.weight, counts_E)
        return y_NO if self.bias is None else y_NO + _bias_of_rows(self.bias, counts_E, len(y_NO))

    def initializers(self) -> dict[str, Initializer]:
        bias_init = self.config.bias_init
        initializers: dict[str, Initializer] = {"weight": self.config.weight_init.build()}
        return initializers | ({} if bias_init is None else {"bias": bias_init.build()})

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.top_k * self.weight[0].numel())

    def own_idle_parameters(self) -> int:
        return sum((len(stack) - self.top_k) * stack[0].numel() for stack in self.parameters())


def _bias_of_rows(bias_EO: Tensor, counts_E: Tensor, num_rows: int) -> Tensor:
    """Return the bias of the expert of each row, `[N, O]`; zeros without gradients for rows beyond the counts."""
    expert_N = torch.searchsorted(counts_E.cumsum(0), torch.arange(num_rows, device=bias_EO.device), right=True)
    return functional.embedding(expert_N, functional.pad(bias_EO, (0, 0, 0, 1)))
