"""The choice of experts for each token."""

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
    """Chooses each token's experts and how much each of them counts; built with `dim`, the width of the stream.

    N tokens, D width, E experts, K experts of a token.
    """

    class Config(Layer.Config):
        num_experts: int
        """Experts to choose from."""

        top_k: int
        """Experts of a token."""

        def validate(self) -> None:
            if not 1 <= self.top_k <= self.num_experts:
                raise ValueError(
                    f"Got top_k {self.top_k} of num_experts {self.num_experts}. A token goes to different experts. "
                    f"Set top_k to 1 to {max(self.num_experts, 1)}."
                )

    @abc.abstractmethod
    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of each token's experts, int64 `[N, K]`, all different, and their weights `[N, K]`."""

    def update(self, counts_E: Tensor) -> None:
        """Act on the tokens that each expert got in a step, of all ranks, after the optimizer did. Most do nothing."""

    def roles(self) -> Roles:
        """What each part is; see `titan_models.layers.roles`. Most have none: a router is held whole, in the stream."""
        return {}


class TopKRouter(Router):
    """The experts with the highest scores, weighted by these: a linear projection, a softmax or sigmoid, a choice.

    A softmax over the chosen experts alone, as GPT-OSS has it, is one over all of them with `renormalize`. Computed in
    fp32 or wider; the weights have the dtype of the tokens.
    """

    class Config(Router.Config):
        score: Literal["softmax", "sigmoid"] = "softmax"
        """What makes scores of logits: over all experts, or for each by itself."""

        groups: ExpertGroups.Config | None = None
        """The choice is limited to a token's best groups. None: it is not."""

        renormalize: bool = False
        """A token's weights are divided by their sum."""

        balancing: BalancingBias.Config | None = None
        """A bias that experts are chosen by, and that no weight contains. None: there is none."""

        losses: list[RouterLoss.Config] = []
        """Losses on scores, such as `ZLoss` and `LoadBalancingLoss`, added to that of the head."""

        scale: float = 1.0
        """What weights are multiplied by in the end."""

        weight_init: Initializer.Config = Normal.Config()
        """How the projection is drawn."""

        bias_init: Initializer.Config | None = None
        """How the projection's bias is drawn. None: there is none."""

        def validate(self) -> None:
            Router.Config.validate(self)
            if not self.scale > 0:  # nan is not
                raise ValueError(f"Got scale {self.scale}. Weights are multiplied by it. Set it above 0, such as 1.")
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
        self.losses = nn.ModuleList(loss.build(num_experts=config.num_experts) for loss in config.losses)
        self.auxiliary_loss = AuxiliaryLoss()

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(x_ND.dtype, torch.float32)
        bias_E = None if self.bias is None else self.bias.to(precision)
        logits_NE = functional.linear(x_ND.to(precision), self.weight.to(precision), bias_E)
        scores_NE = logits_NE.softmax(-1) if self.config.score == "softmax" else logits_NE.sigmoid()
        chosen_NK = self._choose(scores_NE.detach())
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.config.renormalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        if self.losses and torch.is_grad_enabled():
            losses_LN = torch.stack([loss(logits_NE, scores_NE) for loss in self.losses])
            weights_NK = self.auxiliary_loss(weights_NK, losses_LN.sum())
        return chosen_NK, (weights_NK * self.config.scale).to(x_ND.dtype)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        judged = scores_NE if self.balancing is None else self.balancing(scores_NE)
        limited = judged if self.groups is None else self.groups.limit(judged)
        return limited.topk(self.config.top_k, dim=-1, sorted=False).indices

    def update(self, counts_E: Tensor) -> None:
        if self.balancing is not None:
            self.balancing.update(counts_E)
        for loss in self.losses:
            cast(RouterLoss, loss).update(counts_E)

    def roles(self) -> Roles:
        return {"auxiliary_loss": "auxiliary_loss"} if self.losses else {}

    def initializers(self) -> dict[str, Initializer]:
        bias_init = self.config.bias_init
        return {"weight": self.weight_init} | ({} if bias_init is None else {"bias": bias_init.build()})

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.weight.numel())


def _check_groups(groups: ExpertGroups.Config, num_experts: int, top_k: int) -> None:
    size = num_experts // groups.num_groups
    if num_experts % groups.num_groups:
        raise ValueError(
            f"Got {num_experts} experts in {groups.num_groups} groups. Groups have as many experts each. "
            "Set num_groups to a divisor of num_experts."
        )
    if groups.score == "sum of best two" and size < 2:
        raise ValueError(
            f"Got groups of one expert, judged by the sum of their best two. That needs two. Set num_groups to "
            f"{max(num_experts // 2, 1)} or less, or score to 'best'."
        )
    if groups.num_kept * size < top_k:
        raise ValueError(
            f"Got top_k {top_k} from {groups.num_kept} groups of {size} experts. A token's experts are all different. "
            f"Set num_kept to {-(-top_k // size)} or more."
        )
