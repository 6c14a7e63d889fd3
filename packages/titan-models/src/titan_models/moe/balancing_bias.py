"""Auxiliary-loss-free load balancing: a bias on the scores by which experts are selected."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_models.initialization.initializers import Constant, Initializer
from titan_models.moe.fp32_state import Fp32State


class BalancingBias(Fp32State):
    """A bias of each expert that is added to the scores for expert selection, but not to the routing weights.

    After each optimizer step `bias += rate * sign(mean - counts)`, with the tokens per expert of the global batch:
    experts with few tokens get a higher bias. The bias is a persistent buffer in fp32, whatever the dtype of the model,
    since bf16 would round a step of 0.001 away.
    N tokens, E experts. Source: Wang et al., "Auxiliary-loss-free load balancing" (2024), as in DeepSeek-V3.
    """

    class Config(Fp32State.Config):
        rate: float = 1e-3
        """Change of the bias per step. 0: the bias stays as loaded."""

        def validate(self) -> None:
            if not 0 <= self.rate < float("inf"):
                raise ValueError(f"BalancingBias rate must be finite and >= 0, got {self.rate}.")

    bias: Tensor

    def __init__(self, config: Config, *, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.rate = config.rate
        self.register_buffer("bias", torch.full((num_experts,), torch.nan, dtype=torch.float32))

    def forward(self, scores_NE: Tensor) -> Tensor:
        """Return the scores for expert selection."""
        return scores_NE + self.bias

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        """Update the bias; `counts` are the tokens per expert of a step, summed over all ranks."""
        excess_E = counts_E * len(counts_E) - counts_E.sum()
        self.bias.sub_(excess_E.sign(), alpha=self.rate)

    def initializers(self) -> dict[str, Initializer]:
        return {"bias": Constant.Config(value=0.0).build()}
