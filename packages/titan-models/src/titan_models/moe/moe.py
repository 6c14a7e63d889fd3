"""The mixture-of-experts (MoE) feed-forward layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.roles import Roles, under
from titan_models.layers.swiglu import SwiGLU
from titan_models.moe.experts import Experts
from titan_models.moe.router import Router
from titan_models.training.step_counter import StepCounter


class MoE(FeedForward):
    """The weighted sum of the outputs of the experts of each token, plus the output of shared experts.

    The tokens per expert are counted over each step. The router may balance the load by them, and they give the metric
    `expert_load`: the tokens of the busiest expert, in multiples of the mean. B batch, T tokens, N = B T, D width,
    E experts, K experts of a token (top_k).
    """

    class Config(FeedForward.Config):
        router: Router.Config
        """The router, which selects the experts of each token."""

        experts: Experts.Config
        """The routed experts."""

        weighted: Literal["output", "input"] = "output"
        """The side of the experts that routing weights multiply: the output, or the input as in Llama 4."""

        shared: SwiGLU.Config | None = None
        """The shared experts of all tokens, as one layer of their total width. None: no shared experts."""

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        num_experts, top_k = config.router.num_experts, config.router.top_k
        self.router: Router = config.router.build(dim=dim)
        self.experts: Experts = config.experts.build(dim=dim, num_experts=num_experts, top_k=top_k)
        self.shared: SwiGLU | None = None if config.shared is None else config.shared.build(dim=dim)
        self.token_counter = StepCounter(num_experts, update=self.router.update, metrics=_metrics)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        selected_NK, weights_NK = self.router(x_ND)
        order, counts_E = self._sort(selected_NK)
        weights_NK = self.token_counter(weights_NK, counts_E)
        sorted_input = x_ND.index_select(0, order // selected_NK.shape[1])
        if self.config.weighted == "input":
            sorted_input = sorted_input * weights_NK.flatten().index_select(0, order).unsqueeze(-1)
        sorted_output = self.experts(sorted_input, counts_E)
        output_NKD = sorted_output.index_select(0, order.argsort()).unflatten(0, selected_NK.shape)
        if self.config.weighted == "output":
            output_NKD = output_NKD * weights_NK.unsqueeze(-1)
        output_BTD = output_NKD.sum(1).view_as(x_BTD)
        return output_BTD if self.shared is None else output_BTD + self.shared(x_BTD)

    def _sort(self, selected_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the order of all assignments by expert, `[N K]`, and the tokens per expert, `[E]`."""
        selected = selected_NK.flatten()
        counts = torch.zeros(self.config.router.num_experts, dtype=torch.int64, device=selected.device)
        return selected.argsort(stable=True), counts.scatter_add_(0, selected, torch.ones_like(selected))

    def roles(self) -> Roles:
        """Return the roles: one region if the experts shard their features over tensor-parallel ranks.

        In the region each rank routes all tokens alike, and the partial outputs are summed at its end. Otherwise router
        and experts are replicated outside of regions, and the shared experts are a region by themselves.
        """
        experts = under("experts", self.experts.roles())
        shared = {} if self.shared is None else under("shared", self.shared.roles())
        roles: Roles = {"token_counter": "step_counter", **under("router", self.router.roles())}
        if experts:
            roles[""] = "region"
            shared.pop("shared", None)
        return roles | experts | shared


def _metrics(counts_E: Tensor) -> dict[str, float]:
    return {"expert_load": float(counts_E.max() / counts_E.mean().clamp(min=1e-9))}
