"""MoE layers: the output is the weighted sum over the experts of each token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from titan_models import Normal, SwiGLU, init_weights
from titan_models.moe import (
    ClampedGating,
    ExpertGroups,
    Experts,
    ForLoop,
    GroupedMM,
    MoE,
    Router,
    SwiGLUExperts,
    TopKRouter,
)
from torch import Tensor, nn
from torch.nn import functional

DIM, HIDDEN, EXPERTS = 32, 16, 8
BIASES = Normal.Config(std=0.02)
LIKE_GPT_OSS = {"gating": ClampedGating.Config(), "bias_init": BIASES}


def moe(**router: Any) -> MoE.Config:
    return MoE.Config(
        router=TopKRouter.Config(**{"num_experts": EXPERTS, "top_k": 3, **router}),
        experts=SwiGLUExperts.Config(hidden_dim=HIDDEN),
    )


def build(config: Any, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    module = config.build(dim=DIM, **sizes)
    init_weights(module, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(20)  # so that gates are nonlinear and scores differ
    return module.to(dtype)


def hidden_states(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    shape = shape or (2, 20, DIM)
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def naive(layer: MoE, x_BTD: Tensor) -> Tensor:
    """Return the output computed token by token and expert by expert."""
    rows = []
    for x_D in x_BTD.flatten(0, 1):
        chosen, weights = layer.router(x_D[None])
        row = torch.zeros_like(x_D) if layer.shared is None else layer.shared(x_D)
        of_input = layer.config.weighted == "input"
        for expert, weight in zip(chosen[0].tolist(), weights[0], strict=True):
            given = weight * x_D if of_input else x_D
            result = naive_expert(layer.experts, expert, given)
            row = row + (result if of_input else weight * result)
        rows.append(row)
    return torch.stack(rows).view_as(x_BTD)


def naive_expert(experts: SwiGLUExperts, number: int, x_D: Tensor) -> Tensor:
    gate, up, down = experts.gate_proj, experts.up_proj, experts.down_proj
    if gate.bias is None:
        return down.weight[number] @ (functional.silu(gate.weight[number] @ x_D) * (up.weight[number] @ x_D))
    gate, up = (linear.weight[number] @ x_D + linear.bias[number] for linear in (gate, up))
    gate, up = torch.minimum(gate, torch.tensor(7.0)), torch.maximum(up, torch.tensor(-7.0))
    hidden = gate / (1 + torch.exp(-1.702 * gate)) * (1 + torch.minimum(up, torch.tensor(7.0)))
    return down.weight[number] @ hidden + down.bias[number]


def gradients(module: nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(output.square().sum(), [x, *module.parameters()])]


CASES = {
    "softmax": {},
    "one expert": {"top_k": 1},
    "all experts": {"top_k": EXPERTS},
    "sigmoid, renormalized": {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    "groups": {"groups": ExpertGroups.Config(num_groups=4, num_kept=2, score="best")},
    "a bias": {"bias_init": BIASES},
}


@pytest.mark.parametrize("weighted", ["output", "input"])
@pytest.mark.parametrize("shared", [False, True], ids=["no shared", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_weighted_sum_over_the_experts_of_each_token(case: str, shared: bool, weighted: str) -> None:
    config = moe(**CASES[case])
    config.weighted = weighted
    config.shared = SwiGLU.Config(hidden_dim=24) if shared else None
    layer, x = build(config), hidden_states().requires_grad_()
    output, expected = layer(x), naive(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(layer, x, output), gradients(layer, x, expected), strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm() + 1e-13


def test_clamped_experts_with_biases_equal_their_formula() -> None:
    """The inputs are large enough that all clamps are active."""
    config = moe(bias_init=BIASES)
    config.experts = SwiGLUExperts.Config(hidden_dim=HIDDEN, **LIKE_GPT_OSS)
    layer, x = build(config), (3 * hidden_states()).requires_grad_()
    projected = torch.einsum("btd,ehd->bteh", x.detach(), layer.experts.up_proj.weight)
    assert projected.min() < -7 and projected.max() > 7 and projected.abs().median() < 7
    output, expected = layer(x), naive(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(layer, x, output), gradients(layer, x, expected), strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm() + 1e-13


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU"))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("counts", [[5, 0, 7, 1, 0, 3, 20, 4], [0] * 7 + [40], [40] + [0] * 7, [5] * 8, [0] * 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_equals_the_for_loop_up_to_rounding(
    counts: list[int], dtype: torch.dtype, device: str, within_rounding: Any
) -> None:
    """Forward and backward, with experts without tokens, and with padding rows."""
    experts = build(SwiGLUExperts.Config(hidden_dim=HIDDEN), dtype, num_experts=EXPERTS, top_k=3).to(device)
    results = []
    for kernel, wide in ((GroupedMM, dtype), (ForLoop, dtype), (ForLoop, torch.float64)):
        x, weight = (
            each.detach().to(device, wide) for each in (hidden_states(dtype, 43, DIM), experts.gate_proj.weight)
        )
        output = kernel.Config().build()(x.requires_grad_(), weight.requires_grad_(), torch.tensor(counts).to(device))
        output = output[: sum(counts)]
        total = output.to(torch.promote_types(wide, torch.float32)).square().sum()
        x_gradient, weight_gradient = torch.autograd.grad(total, [x, weight])
        results.append((output, x_gradient[: sum(counts)], weight_gradient))
    assert all(within_rounding(*each) for each in zip(*results, strict=True))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 32), (torch.float32, 33), (torch.bfloat16, 36)])
def test_grouped_mm_falls_back_to_the_loop_for_unsupported_operands(dtype: torch.dtype, dim: int) -> None:
    x, weight, counts = hidden_states(dtype, 9, dim), hidden_states(dtype, 2, 8, dim), torch.tensor([4, 5])
    outputs = [kernel(x, weight, counts) for kernel in (GroupedMM.Config().build(), ForLoop.Config().build())]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{}, LIKE_GPT_OSS], ids=["plain", "clamped, biases"])
@pytest.mark.parametrize("kernel", [GroupedMM.Config(), ForLoop.Config()], ids=["grouped", "loop"])
def test_padding_rows_affect_no_output_and_no_gradient(
    kernel: Any, options: dict[str, Any], within_rounding: Any
) -> None:
    """Not even with NaN in their inputs and in their incoming gradients."""
    config = SwiGLUExperts.Config(hidden_dim=HIDDEN, kernel=kernel, **options)
    experts = build(config, torch.float32, num_experts=4, top_k=1)
    counts, num_tokens = torch.tensor([3, 0, 6, 2]), 11
    x = hidden_states(torch.float32, 16, DIM)
    clean = x[:num_tokens].clone().requires_grad_()
    expected = experts(clean, counts)
    expected_gradients = gradients(experts, clean, expected)
    config.kernel = ForLoop.Config()
    exact, of_exact = build(config, torch.float64, num_experts=4, top_k=1), clean.detach().double().requires_grad_()
    exact_output = exact(of_exact, counts)
    exact_gradients = gradients(exact, of_exact, exact_output)
    x[num_tokens:] = torch.nan
    x.requires_grad_()
    output = experts(x, counts)
    assert torch.equal(output[num_tokens:], torch.zeros(5, DIM))
    assert within_rounding(output[:num_tokens], expected, exact_output)
    incoming = torch.cat([2 * expected.detach(), torch.full((5, DIM), torch.nan)])
    found = torch.autograd.grad(output, [x, *experts.parameters()], incoming)
    assert torch.equal(found[0][num_tokens:], torch.zeros(5, DIM))
    for each in zip((found[0][:num_tokens], *found[1:]), expected_gradients, exact_gradients, strict=True):
        assert within_rounding(*each)


def test_the_tests_detect_tokens_at_the_wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build(moe()), hidden_states()
    expected = naive(layer, x)
    forward = SwiGLUExperts.forward
    monkeypatch.setattr(SwiGLUExperts, "forward", lambda self, x, counts: forward(self, x, counts.roll(1)))
    assert (layer(x) - expected).abs().max() > 1e-3


def their_router(name: str, **config: Any) -> Any:
    model, cls = name.split(".")
    module = getattr(transformers.models, model)
    hf_config = getattr(module, config.pop("config_class"))(hidden_size=DIM, num_experts_per_tok=3, **config)
    modeling = __import__(f"transformers.models.{model}.modeling_{model}", fromlist=[cls])
    return getattr(modeling, cls)(hf_config)


ROUTERS = {
    "Qwen3 MoE": (
        {"renormalize": True},
        lambda: their_router(
            "qwen3_moe.Qwen3MoeTopKRouter", config_class="Qwen3MoeConfig", num_experts=EXPERTS, norm_topk_prob=True
        ),
    ),
    "DeepSeek-V2": (
        {"scale": 16.0, "groups": ExpertGroups.Config(num_groups=4, num_kept=2, score="best")},
        lambda: their_router(
            "deepseek_v2.DeepseekV2TopkRouter",
            config_class="DeepseekV2Config",
            n_routed_experts=EXPERTS,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=16.0,
        ),
    ),
    "DeepSeek-V3": (
        {
            "score": "sigmoid",
            "renormalize": True,
            "scale": 2.5,
            "groups": ExpertGroups.Config(num_groups=4, num_kept=2, score="sum of best two"),
        },
        lambda: their_router(
            "deepseek_v3.DeepseekV3TopkRouter",
            config_class="DeepseekV3Config",
            n_routed_experts=EXPERTS,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        ),
    ),
    "GPT-OSS": (
        {"renormalize": True, "bias_init": BIASES},
        lambda: their_router("gpt_oss.GptOssTopKRouter", config_class="GptOssConfig", num_local_experts=EXPERTS),
    ),
}


@pytest.mark.parametrize("family", ROUTERS)
def test_selected_experts_and_routing_weights_equal_transformers(family: str, fp64_model: Any, in_fp64: Any) -> None:
    config, make = ROUTERS[family]
    router, theirs, x = build(moe(**config).router), fp64_model(make()), hidden_states(torch.float64, 200, DIM)
    with torch.no_grad(), in_fp64():
        theirs.weight.copy_(router.weight)
        if router.bias is not None:
            theirs.bias.copy_(router.bias)
        chosen, weights = router(x)
        _, their_weights, their_chosen = theirs(x)
    (chosen, order), (their_chosen, their_order) = chosen.sort(), their_chosen.sort()
    assert torch.equal(chosen, their_chosen)
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-10, atol=1e-13)


class NextTwo(Router):
    """A custom router: token i goes to experts i and i + 1."""

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.arange(len(x_ND)) % self.num_experts
        return torch.stack([first, (first + 1) % self.num_experts], 1), x_ND.new_full((len(x_ND), 2), 0.5)

    def __init__(self, config: Router.Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = config.num_experts

    def own_flops(self, seq_len: int) -> Any: ...


class Numbered(Experts):
    """Custom experts: expert e multiplies by e."""

    def __init__(self, config: Any, **sizes: int) -> None:
        nn.Module.__init__(self)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        return x_ND * torch.arange(len(counts_E)).repeat_interleave(counts_E)[:, None]

    def own_flops(self, seq_len: int) -> Any: ...


def test_custom_routers_and_experts_work() -> None:
    config = MoE.Config(router=NextTwo.Config(num_experts=4, top_k=2), experts=Numbered.Config())
    x = hidden_states(torch.float64, 1, 6, DIM)
    factors = torch.tensor([0.5, 1.5, 2.5, 1.5, 0.5, 1.5])[:, None]
    torch.testing.assert_close(config.build(dim=DIM)(x), x * factors)


def test_an_empty_batch_works() -> None:
    assert build(moe())(hidden_states()[:, :0]).shape == (2, 0, DIM)


def test_invalid_moe_configs_are_rejected_with_a_reason() -> None:
    def groups(num_groups: int, num_kept: int, score: str = "best") -> dict[str, Any]:
        return {"groups": ExpertGroups.Config(num_groups=num_groups, num_kept=num_kept, score=score)}

    for router, message in [
        ({"top_k": 9}, r"top_k must be 1 to num_experts \(8\), got 9"),
        ({"top_k": 0}, "top_k must be .* got 0"),
        ({"num_experts": 0}, r"num_experts \(0\)"),
        ({"scale": 0.0}, "scale must be > 0, got 0.0"),
        (groups(3, 1), r"num_groups must divide num_experts \(8\), got 3"),
        (groups(4, 1), "top_k must be at most 2, .* 1 groups of 2, got 3. Set num_kept to 2"),
        (groups(4, 5), r"num_kept must be 1 to num_groups \(4\), got 5"),
        (groups(8, 8, "sum of best two"), r"at least 2 experts.*got 1 \(8 experts in 8 groups\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            moe(**router).build(dim=DIM)
    config = moe()
    config.experts.hidden_dim = 0
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got 0"):
        config.build(dim=DIM)
    for gating, message in [
        ({"alpha": 0.0}, "alpha must be > 0, got 0.0"),
        ({"limit": -7.0}, "limit must be > 0, got -7.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ClampedGating.Config(**gating).build()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_moe_layer_is_one_graph_with_the_same_results(
    dtype: torch.dtype, backend: str, within_rounding: Any
) -> None:
    layer, x = build(moe(), dtype), hidden_states(dtype)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x.requires_grad_()
    exact, of_exact = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    output, expected, exact_output = compiled(x), layer(x), exact(of_exact)
    assert within_rounding(output, expected, exact_output)
    found = (gradients(layer, x, each) for each in (output, expected))
    for each in zip(*found, gradients(exact, of_exact, exact_output), strict=True):
        assert within_rounding(*each)
