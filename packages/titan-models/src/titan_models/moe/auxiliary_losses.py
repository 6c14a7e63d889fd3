"""Losses on what a router computes. N tokens, E experts."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from titan_models.initialization.initializers import Constant, Initializer
from titan_models.moe.fp32_state import Fp32State


class RouterLoss(Fp32State, abc.ABC):
    """A loss that is a sum over tokens, each by itself; built with `num_experts`."""

    class Config(Fp32State.Config):
        weight: float
        """What it is multiplied by, relative to the loss of a token at the head."""

        def validate(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"Got weight {self.weight}. A loss is multiplied by it. Set it to 0.001, say.")

    @abc.abstractmethod
    def forward(self, logits_NE: Tensor, scores_NE: Tensor) -> Tensor:
        """The loss of each token, `[N]`, with its weight."""

    @abc.abstractmethod
    def update(self, counts_E: Tensor) -> None:
        """Act on the tokens that each expert got in a step, of all ranks, after the optimizer did."""


class ZLoss(RouterLoss):
    """`logsumexp(logits)^2`: keeps logits small, where rounding them does little harm.

    Source: Zoph et al., "ST-MoE" (2022), equation 5, as a sum.
    """

    def __init__(self, config: RouterLoss.Config, *, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.config = config

    def forward(self, logits_NE: Tensor, scores_NE: Tensor) -> Tensor:
        return self.config.weight * logits_NE.logsumexp(-1).square()

    def update(self, counts_E: Tensor) -> None:
        pass


class LoadBalancingLoss(RouterLoss):
    """`E sum_e f_e p_e`: `p` is a token's scores divided by their sum, `f` each expert's share of all choices.

    1 where both are even. The shares are those of the global batch of the step before (even in the first), a part of
    the state: known on all ranks before the forward, so that the loss is a sum over tokens and no split of the batch
    changes it. Shares of a micro-batch would demand balance within it, which harms specialization.
    Sources: Fedus et al., "Switch Transformers" (2021), equation 4; Qiu et al., "Demons in the detail" (2025), for
    shares of the global batch.
    """

    shares: Tensor

    def __init__(self, config: RouterLoss.Config, *, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.num_experts = num_experts
        self.register_buffer("shares", torch.full((num_experts,), torch.nan, dtype=torch.float32))

    def forward(self, logits_NE: Tensor, scores_NE: Tensor) -> Tensor:
        loads_E = self.shares.to(scores_NE.dtype) * self.num_experts
        return self.config.weight * (scores_NE * loads_E).sum(-1) / scores_NE.sum(-1)

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        total = counts_E.sum()
        self.shares.copy_(torch.where(total > 0, counts_E / total, self.shares))

    def initializers(self) -> dict[str, Initializer]:
        return {"shares": Constant.Config(value=1 / self.num_experts).build()}
