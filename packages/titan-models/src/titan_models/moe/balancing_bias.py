"""Balancing of experts by a bias on the scores that they are chosen by, without a loss of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_models.initialization.initializers import Constant, Initializer
from titan_models.moe.fp32_state import Fp32State


class BalancingBias(Fp32State):
    """Experts with few tokens get a higher bias, those with many a lower one, step by step; weights do not know of it.

    `bias += rate * sign(mean - counts)` after each optimizer step, from the counts of the whole global batch. The bias
    is a part of the model's state, in fp32 whatever the model's dtype: a step of 0.001 is lost in bf16.
    N tokens, E experts. Source: Wang et al., "Auxiliary-loss-free load balancing" (2024), as in DeepSeek-V3.
    """

    class Config(Fp32State.Config):
        rate: float = 1e-3
        """What is added to an expert's bias or taken from it in a step. 0: the bias stays as it was loaded."""

        def validate(self) -> None:
            if not 0 <= self.rate < float("inf"):
                raise ValueError(
                    f"Got rate {self.rate}. A bias rises and falls by it. Set it to 0.001, say, or to 0 to keep it."
                )

    bias: Tensor

    def __init__(self, config: Config, *, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.rate = config.rate
        self.register_buffer("bias", torch.full((num_experts,), torch.nan, dtype=torch.float32))

    def forward(self, scores_NE: Tensor) -> Tensor:
        """The scores to choose by."""
        return scores_NE + self.bias

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        """Move the bias against the load: `counts` are the tokens of each expert in a step, of all ranks."""
        excess_E = counts_E * len(counts_E) - counts_E.sum()
        self.bias.sub_(excess_E.sign(), alpha=self.rate)

    def initializers(self) -> dict[str, Initializer]:
        return {"bias": Constant.Config(value=0.0).build()}
