"""Balancing of experts: by a bias that moves against the load, and that no weight contains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import init_weights
from titan_models.moe import BalancingBias, ExpertGroups, TopKRouter
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

DIM, EXPERTS = 32, 8


def router(**options: Any) -> TopKRouter:
    config = TopKRouter.Config(
        **{"num_experts": EXPERTS, "top_k": 3, "score": "sigmoid", "balancing": BalancingBias.Config(), **options}
    )
    made = config.build(dim=DIM)
    init_weights(made, seed=0)
    with torch.no_grad():
        made.weight.mul_(20)
    return made


def stream(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", [0, 1])
def test_experts_chosen_by_a_bias_are_those_of_deepseek(seed: int) -> None:
    groups = ExpertGroups.Config(num_groups=4, num_kept=2, score="sum of best two")
    ours = router(renormalise=True, scale=2.5, groups=groups)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=DIM,
            num_experts_per_tok=3,
            n_routed_experts=EXPERTS,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    x, bias = stream(200, DIM), 0.3 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        unbiased, _ = ours(x)
        ours.balancing.bias.copy_(bias)
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
        chosen, weights = ours(x)
        _, their_weights, their_chosen = theirs(x)
    (chosen, order), (their_chosen, their_order) = chosen.sort(), their_chosen.sort()
    assert torch.equal(chosen, their_chosen)
    assert not torch.equal(chosen, unbiased.sort().values)
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-5, atol=1e-6)


def test_the_bias_moves_against_the_load() -> None:
    bias = router(balancing=BalancingBias.Config(rate=0.25)).balancing
    bias.move(torch.tensor([9, 0, 4, 4, 4, 4, 3, 4]))  # a mean of 4
    assert bias.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0.25, 0]
    bias.move(torch.tensor([4, 4, 4, 4, 4, 4, 3, 5]))
    assert bias.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0.5, -0.25]


@pytest.mark.parametrize("rate", [-0.1, float("inf"), float("nan")])
def test_a_rate_is_finite_and_not_negative(rate: float) -> None:
    with pytest.raises(ValueError, match="Got rate"):
        BalancingBias.Config(rate=rate).build(num_experts=4)


def test_the_bias_is_state_in_fp32_whatever_the_dtype_and_the_device() -> None:
    made = router()
    made.balancing.bias.fill_(0.1234567)
    made.to(torch.bfloat16)
    assert made.weight.dtype is torch.bfloat16
    assert made.state_dict()["balancing.bias"].dtype is torch.float32
    assert torch.equal(made.balancing.bias, torch.full((EXPERTS,), 0.1234567))
    made.to("meta").to(torch.float64).to_empty(device="cpu")
    init_weights(made, seed=0)
    assert made.balancing.bias.dtype is torch.float32
    assert made.balancing.bias.tolist() == [0] * EXPERTS
