"""Load balancing of experts, by a selection bias and by auxiliary losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import Decoder, init_weights
from titan_models.moe import BalancingBias, ExpertGroups, LoadBalancingLoss, MoE, TopKRouter, ZLoss
from titan_models.qwen3 import qwen3_moe_debug
from torch import Tensor
from torch.nn import functional
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

DIM, EXPERTS = 32, 8


def router(**options: Any) -> TopKRouter:
    config = TopKRouter.Config(
        **{"num_experts": EXPERTS, "top_k": 3, "score": "sigmoid", "balancing": BalancingBias.Config(), **options}
    )
    module = config.build(dim=DIM)
    init_weights(module, seed=0)
    with torch.no_grad():
        module.weight.mul_(20)
    return module


def hidden_states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", [0, 1])
def test_selection_with_a_bias_equals_deepseek_v3_in_transformers(seed: int, fp64_model: Any, in_fp64: Any) -> None:
    groups = ExpertGroups.Config(num_groups=4, num_kept=2, score="sum of best two")
    ours = router(renormalize=True, scale=2.5, groups=groups)
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
    ours, theirs = ours.double(), fp64_model(theirs)
    x, bias = (
        hidden_states(200, DIM).double(),
        0.3 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed)),
    )
    with torch.no_grad(), in_fp64():
        unbiased, _ = ours(x)
        ours.balancing.bias.copy_(bias)
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
        chosen, weights = ours(x)
        _, their_weights, their_chosen = theirs(x)
    (chosen, order), (their_chosen, their_order) = chosen.sort(), their_chosen.sort()
    assert torch.equal(chosen, their_chosen)
    assert not torch.equal(chosen, unbiased.sort().values)
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-10, atol=1e-13)


def test_the_bias_moves_against_the_load() -> None:
    bias = router(balancing=BalancingBias.Config(rate=0.25)).balancing
    bias.update(torch.tensor([9, 0, 4, 4, 4, 4, 3, 4]))  # a mean of 4
    assert bias.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0.25, 0]
    bias.update(torch.tensor([4, 4, 4, 4, 4, 4, 3, 5]))
    assert bias.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0.5, -0.25]


@pytest.mark.parametrize("rate", [-0.1, float("inf"), float("nan")])
def test_a_rate_is_finite_and_not_negative(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be finite and >= 0"):
        BalancingBias.Config(rate=rate).build(num_experts=4)


def test_the_bias_is_a_persistent_fp32_buffer_in_any_dtype_and_on_any_device() -> None:
    module = router()
    module.balancing.bias.fill_(0.1234567)
    module.to(torch.bfloat16)
    assert module.weight.dtype is torch.bfloat16
    assert module.state_dict()["balancing.bias"].dtype is torch.float32
    assert torch.equal(module.balancing.bias, torch.full((EXPERTS,), 0.1234567))
    module.to("meta").to(torch.float64).to_empty(device="cpu")
    init_weights(module, seed=0)
    assert module.balancing.bias.dtype is torch.float32
    assert module.balancing.bias.tolist() == [0] * EXPERTS


def test_the_tests_detect_a_bias_in_the_routing_weights(
    monkeypatch: pytest.MonkeyPatch, fp64_model: Any, in_fp64: Any
) -> None:
    monkeypatch.setattr(BalancingBias, "forward", lambda self, scores: scores.add_(self.bias))  # in place
    with pytest.raises(AssertionError):
        test_selection_with_a_bias_equals_deepseek_v3_in_transformers(0, fp64_model, in_fp64)


def small(shrunk: Any, build_model: Any, **router: Any) -> Decoder:
    config = shrunk(qwen3_moe_debug)
    for name, value in router.items():
        setattr(config.block.feed_forward.router, name, value)
    return build_model(config, torch.float64)


def flat_loss(model: Decoder, batch: dict[str, Tensor], labels: Tensor, shares: list[Tensor], score: str) -> Tensor:
    """Return the sum of cross-entropy, 0.3 x balancing loss and 0.01 x z-loss, from the inputs of each router."""
    inputs_of: list[Tensor] = []
    routers = [layer.feed_forward.router for layer in model.layers]
    hooks = [router.register_forward_hook(lambda _, inputs, __: inputs_of.append(inputs[0])) for router in routers]
    total = functional.cross_entropy(model(**batch).flatten(0, 1), labels.flatten(), reduction="sum")
    for hook in hooks:
        hook.remove()
    for router, x, share in zip(routers, inputs_of, shares, strict=True):
        for logits in x @ router.weight.T:
            scores = logits.softmax(0) if score == "softmax" else logits.sigmoid()
            total = total + 0.3 * len(share) * (share * scores / scores.sum()).sum()
            total = total + 0.01 * logits.exp().sum().log() ** 2
    return total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_losses_add_to_the_loss_of_the_head(shrunk: Any, build_model: Any, packed: Any, score: str) -> None:
    """Two steps in micro-batches, compared with a loop over tokens; the second uses the fractions of the first."""
    losses = [LoadBalancingLoss.Config(weight=0.3), ZLoss.Config(weight=0.01)]
    model, flat = (
        small(shrunk, build_model, auxiliary_losses=losses, score=score),
        small(shrunk, build_model, score=score),
    )
    labels = packed["tokens"].roll(-1, 1)
    shares = [torch.full((8,), 1 / 8, dtype=torch.float64)] * 3
    for _ in range(2):
        for row in range(2):
            model.scale_auxiliary_losses(1 / 80)
            logits = model(**{name: tensor[row : row + 1] for name, tensor in packed.items()})
            (functional.cross_entropy(logits[0], labels[row], reduction="sum") / 80).backward()
        (flat_loss(flat, packed, labels, shares, score) / 80).backward()
        for (name, ours), theirs in zip(model.named_parameters(), flat.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm(), name
        model.after_step()
        shares = [layer.feed_forward.router.auxiliary_losses[0].shares.double() for layer in model.layers]
        assert all(share.sum() == pytest.approx(1) and share.max() > 1 / 8 for share in shares)
        model.zero_grad()
        flat.zero_grad()


def test_load_balancing_fractions_are_those_of_all_assignments(shrunk: Any, build_model: Any, packed: Any) -> None:
    model = small(shrunk, build_model, auxiliary_losses=[LoadBalancingLoss.Config(weight=0.3)])
    model.scale_auxiliary_losses(1.0)
    router = model.layers[0].feed_forward.router
    chosen: list[Tensor] = []
    router.register_forward_hook(lambda _, __, output: chosen.append(output[0]))
    model(**packed).sum().backward()
    assert list(model.after_step()) == ["expert_load"]
    expected = torch.bincount(chosen[0].flatten(), minlength=8) / chosen[0].numel()
    torch.testing.assert_close(router.auxiliary_losses[0].shares, expected)


def test_auxiliary_losses_without_a_scale_are_an_error(shrunk: Any, build_model: Any, packed: Any) -> None:
    model = small(shrunk, build_model, auxiliary_losses=[ZLoss.Config(weight=0.01)])
    with pytest.raises(
        RuntimeError, match=r"scale of auxiliary losses must be set.*Call model\.scale_auxiliary_losses"
    ):
        model(**packed)
    with torch.no_grad():
        model(**packed)


def test_expert_load_is_the_maximum_in_multiples_of_the_mean() -> None:
    layer = MoE.Config(
        router=TopKRouter.Config(num_experts=4, top_k=1), experts=qwen3_moe_debug().block.feed_forward.experts
    )
    assert layer.build(dim=16).token_counter.metrics(torch.tensor([6.0, 1.0, 1.0, 0.0])) == {"expert_load": 3.0}
    assert layer.build(dim=16).token_counter.metrics(torch.zeros(4)) == {"expert_load": 0.0}
