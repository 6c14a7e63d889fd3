"""Auxiliary losses of routers. N tokens, E experts."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from titan_models.initialization.initializers import Constant, Initializer
from titan_models.moe.fp32_state import Fp32State


class RouterLoss(Fp32State, abc.ABC):
    """An auxiliary loss of a router, a sum of independent terms of tokens; built with `num_experts`."""

    class Config(Fp32State.Config):
        weight: float
        """Coefficient, relative to the loss of a token at the head (aux_loss_coeff)."""

        def validate(self) -> None:
            if not 0 <= self.weight < float("inf"):
                raise ValueError(f"Auxiliary-loss weight must be finite and >= 0, got {self.weight}.")

    @abc.abstractmethod
    def forward(self, logits_NE: Tensor, scores_NE: Tensor) -> Tensor:
        """Return the weighted loss of each token, `[N]`."""

    @abc.abstractmethod
    def update(self, counts_E: Tensor) -> None:
        """Update the state after the optimizer step from the tokens per expert of the step, summed over all ranks."""


class ZLoss(RouterLoss):
    """Router z-loss, `logsumexp(logits)^2`: keeps logits small, so that their rounding errors are small.

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
    """Load-balancing loss, `E sum_e f_e p_e`: `p` are the normalized scores, `f` the fractions of tokens per expert.

    The loss is 1 if either is uniform. The fractions are of all token-expert assignments in the global batch of the
    previous step (uniform in the first step), kept in a persistent buffer. All ranks know them before the forward, so
    that the loss is a sum over tokens and does not depend on how the batch is split. Fractions of a micro-batch would
    enforce balance within the micro-batch, which harms specialization.
    Sources: Fedus et al., "Switch Transformers" (2021), equation 4; Qiu et al., "Demons in the detail" (2025), for
    fractions of the global batch.
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
