"""The mixture of experts as a feed-forward layer."""

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
    """The weighted sum of what a token's experts make of it, and of shared experts that see every token.

    How many tokens each expert gets is counted over a step; the router may balance them by it, and `expert_load` is
    told: the tokens of the expert that has most, in multiples of the mean. B batch, T tokens, N tokens of all rows,
    D width, E experts, K experts of a token.
    """

    class Config(FeedForward.Config):
        router: Router.Config
        """Chooses each token's experts."""

        experts: Experts.Config
        """What they compute."""

        weighted: Literal["output", "input"] = "output"
        """What weights multiply: what experts give, or what they get, as in Llama 4."""

        shared: SwiGLU.Config | None = None
        """The experts of all tokens, as one layer of their common width. None: there are none."""

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        num_experts, top_k = config.router.num_experts, config.router.top_k
        self.router: Router = config.router.build(dim=dim)
        self.experts: Experts = config.experts.build(dim=dim, num_experts=num_experts, top_k=top_k)
        self.shared: SwiGLU | None = None if config.shared is None else config.shared.build(dim=dim)
        self.token_counter = StepCounter(num_experts, update=self.router.update, metrics=_load_of_busiest)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        chosen_NK, weights_NK = self.router(x_ND)
        order, counts_E = self._sort(chosen_NK)
        weights_NK = self.token_counter(weights_NK, counts_E)
        sorted_input = x_ND.index_select(0, order // chosen_NK.shape[1])
        if self.config.weighted == "input":
            sorted_input = sorted_input * weights_NK.flatten().index_select(0, order).unsqueeze(-1)
        sorted_output = self.experts(sorted_input, counts_E)
        output_NKD = sorted_output.index_select(0, order.argsort()).unflatten(0, chosen_NK.shape)
        if self.config.weighted == "output":
            output_NKD = output_NKD * weights_NK.unsqueeze(-1)
        output_BTD = output_NKD.sum(1).view_as(x_BTD)
        return output_BTD if self.shared is None else output_BTD + self.shared(x_BTD)

    def _sort(self, chosen_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The order of all choices by expert, `[N K]`, and how many each expert has, `[E]`."""
        chosen = chosen_NK.flatten()
        counts = torch.zeros(self.config.router.num_experts, dtype=torch.int64, device=chosen.device)
        return chosen.argsort(stable=True), counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    def roles(self) -> Roles:
        """One region, where experts split their features: ranks choose alike for all tokens, and sum at its border.

        Otherwise router and experts are whole, in the stream, and the shared experts a region of their own.
        """
        experts = under("experts", self.experts.roles())
        shared = {} if self.shared is None else under("shared", self.shared.roles())
        own: Roles = {"token_counter": "step_counter", **under("router", self.router.roles())}
        if experts:
            own[""] = "region"
            shared.pop("shared", None)
        return own | experts | shared


def _load_of_busiest(counted: Tensor) -> dict[str, float]:
    return {"expert_load": float(counted.max() / counted.mean().clamp(min=1e-9))}
