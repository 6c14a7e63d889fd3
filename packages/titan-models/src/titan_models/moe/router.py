"""Routers, which select the experts of each token."""

from __future__ import annotations

import abc
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_models.initialization.initializers import Initializer, Normal
from titan_models.layers.flops import Flops, matmul_flops
from titan_models.layers.layer import Layer, new_parameter
from titan_models.layers.roles import Roles
from titan_models.moe.auxiliary_losses import RouterLoss
from titan_models.moe.balancing_bias import BalancingBias
from titan_models.moe.groups import ExpertGroups
from titan_models.training.auxiliary_loss import AuxiliaryLoss


class Router(Layer, abc.ABC):
    """Selects the experts of each token and their routing weights; built with `dim`, the width of the hidden states.

    N tokens, D width, E experts, K experts of a token.
    """

    class Config(Layer.Config):
        num_experts: int
        """Number of experts."""

        top_k: int
        """Number of experts per token."""

        def validate(self) -> None:
            if not 1 <= self.top_k <= self.num_experts:
                raise ValueError(f"top_k must be 1 to num_experts ({self.num_experts}), got {self.top_k}.")

    @abc.abstractmethod
    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expert numbers of each token, int64 `[N, K]` and distinct, and the routing weights `[N, K]`."""

    def update(self, counts_E: Tensor) -> None:
        """Update the state after the optimizer step from the tokens per expert of the step, summed over all ranks.

        The default does nothing.
        """

    def roles(self) -> Roles:
        """Return the role of each module; see `titan_models.layers.roles`. Empty by default: routers are replicated."""
        return {}


class TopKRouter(Router):
    """Selects the experts with the highest scores: a linear projection, softmax or sigmoid, and top-k.

    A softmax over the selected experts alone, as in GPT-OSS, equals `score="softmax"` with `renormalize`. Scores are
    computed in fp32 or wider; the routing weights have the dtype of the tokens.
    """

    class Config(Router.Config):
        score: Literal["softmax", "sigmoid"] = "softmax"
        """Score function of the logits: softmax over all experts, or sigmoid of each."""

        groups: ExpertGroups.Config | None = None
        """Group-limited routing. None: experts are selected from all groups."""

        renormalize: bool = False
        """Divide the routing weights of each token by their sum (norm_topk_prob)."""

        balancing: BalancingBias.Config | None = None
        """A bias for expert selection that does not enter the routing weights. None: no bias."""

        auxiliary_losses: list[RouterLoss.Config] = []
        """Auxiliary losses of the scores, such as `ZLoss` and `LoadBalancingLoss`, added to the loss of the head."""

        scale: float = 1.0
        """Factor of the routing weights, applied last (routed_scaling_factor)."""

        weight_init: Initializer.Config = Normal.Config()
        """The initializer of the weight."""

        bias_init: Initializer.Config | None = None
        """The initializer of the bias. None: no bias."""

        def validate(self) -> None:
            Router.Config.validate(self)
            if not self.scale > 0:  # nan is not
                raise ValueError(f"Router scale must be > 0, got {self.scale}.")
            if self.groups is not None:
                _check_groups(self.groups, self.num_experts, self.top_k)

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.weight = new_parameter(config.num_experts, dim)
        self.weight_init: Initializer = config.weight_init.build()
        self.bias = None if config.bias_init is None else new_parameter(config.num_experts)
        self.groups: ExpertGroups | None = None if config.groups is None else config.groups.build()
        self.balancing: BalancingBias | None = None
        if config.balancing is not None:
            self.balancing = config.balancing.build(num_experts=config.num_experts)
        self.auxiliary_losses = nn.ModuleList(
            loss.build(num_experts=config.num_experts) for loss in config.auxiliary_losses
        )
        self.auxiliary_loss = AuxiliaryLoss()

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(x_ND.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(precision)
        logits_NE = functional.linear(x_ND.to(precision), self.weight.to(precision), bias_E)
        scores_NE = logits_NE.softmax(-1) if self.config.score == "softmax" else logits_NE.sigmoid()
        selected_NK = self._select(scores_NE.detach())
        weights_NK = scores_NE.gather(1, selected_NK)
        if self.config.renormalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        if self.auxiliary_losses and torch.is_grad_enabled():
            losses_LN = torch.stack([loss(logits_NE, scores_NE) for loss in self.auxiliary_losses])
            weights_NK = self.auxiliary_loss(weights_NK, losses_LN.sum())
        return selected_NK, (weights_NK * self.config.scale).to(x_ND.dtype)

    def _select(self, scores_NE: Tensor) -> Tensor:
        selection_NE = scores_NE if self.balancing is None else self.balancing(scores_NE)
        limited_NE = selection_NE if self.groups is None else self.groups.limit(selection_NE)
        return limited_NE.topk(self.config.top_k, dim=-1, sorted=False).indices

    def update(self, counts_E: Tensor) -> None:
        if self.balancing is not None:
            self.balancing.update(counts_E)
        for loss in self.auxiliary_losses:
            cast(RouterLoss, loss).update(counts_E)

    def roles(self) -> Roles:
        return {"auxiliary_loss": "auxiliary_loss"} if self.auxiliary_losses else {}

    def initializers(self) -> dict[str, Initializer]:
        bias_init = self.config.bias_init
        return {"weight": self.weight_init} | ({} if bias_init is None else {"bias": bias_init.build()})

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.weight.numel())


def _check_groups(groups: ExpertGroups.Config, num_experts: int, top_k: int) -> None:
    size = num_experts // groups.num_groups
    if num_experts % groups.num_groups:
        raise ValueError(f"num_groups must divide num_experts ({num_experts}), got {groups.num_groups}.")
    if groups.score == "sum of best two" and size < 2:
        raise ValueError(
            "Groups must have at least 2 experts for score 'sum of best two', got "
            f"{size} ({num_experts} experts in {groups.num_groups} groups). Lower num_groups, or set score to 'best'."
        )
    if groups.num_kept * size < top_k:
        raise ValueError(
            f"top_k must be at most {groups.num_kept * size}, the experts in {groups.num_kept} groups of {size}, got "
            f"{top_k}. Set num_kept to {-(-top_k // size)} or more."
        )
