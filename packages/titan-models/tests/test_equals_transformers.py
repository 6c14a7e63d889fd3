"""Logits and gradients of each family equal those of transformers with the same weights, through the adapter."""

from __future__ import annotations

import functools
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from titan_models import Rope
from titan_models.deepseek import deepseek_debug, deepseek_v2_236b, deepseek_v2_lite_16b, deepseek_v3_671b
from titan_models.gpt_oss import gpt_oss_20b, gpt_oss_120b, gpt_oss_debug
from titan_models.llama3 import llama3_1b, llama3_3b, llama3_8b, llama3_405b, llama3_debug
from titan_models.llama4 import llama4_debug, llama4_maverick, llama4_scout
from titan_models.moe import SiluGating
from titan_models.qwen3 import qwen3_0_6b, qwen3_8b, qwen3_30b_a3b, qwen3_debug, qwen3_moe_debug
from torch import Tensor, nn
from torch.nn import functional

DENSE = [llama3_debug, llama3_1b, llama3_3b, llama3_8b, llama3_405b, qwen3_debug, qwen3_0_6b, qwen3_8b]
MOE = [qwen3_moe_debug, qwen3_30b_a3b, llama4_debug, llama4_scout, llama4_maverick]
DEEPSEEK = [deepseek_debug, deepseek_v2_lite_16b, deepseek_v2_236b, deepseek_v3_671b]
GPT_OSS = [gpt_oss_debug, gpt_oss_20b, gpt_oss_120b]
FLAVORS = [*DENSE, *MOE, *DEEPSEEK, *GPT_OSS]
TIED_AND_NOT = [llama3_1b, llama3_8b, qwen3_0_6b, qwen3_8b, qwen3_30b_a3b]
TIED_AND_NOT += [llama4_maverick, deepseek_v3_671b, gpt_oss_20b]
LENGTH = 96  # three times the shrunk original length


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "positions": torch.arange(LENGTH).expand(2, LENGTH)}


def logits_and_gradients(model: nn.Module, logits: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients; for buffers in the state dict the values instead of gradients."""
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()} | buffers


def as_released(state: dict[str, Tensor], files: Collection[str]) -> dict[str, Tensor]:
    """Split the experts that transformers stacks in memory into the tensors of `files`, one per matrix and expert."""
    released = {name: tensor for name, tensor in state.items() if name in files}
    for name, tensor in state.items():
        if name in files:
            continue
        parts = {name: tensor}
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        for part, value in parts.items():
            stem, _, last = part.rpartition(".")
            of_experts = {f"{stem}.{number}.{last}.weight": matrix for number, matrix in enumerate(value)}
            released |= of_experts if stem.endswith("experts") else {part: value}
    return released


def of_ours(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits, and gradients by their names in checkpoints."""
    logits, gradients = logits_and_gradients(model, model(**batch), batch["tokens"])
    return logits, model.config.hf_adapter().to_hf(gradients)


def of_theirs(model: nn.Module, batch: dict[str, Tensor], context: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with context:
        logits = model(batch["tokens"]).logits
    return logits_and_gradients(model, logits, batch["tokens"])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_logits_and_gradients_are_equal(
    flavor: Any, seed: int, shrunk: Any, build_model: Any, reference: Any, batch: dict[str, Tensor], in_fp64: Any
) -> None:
    model = build_model(shrunk(flavor), torch.float64, seed)
    expected_logits, expected = of_theirs(reference(model, torch.float64), batch, in_fp64())
    logits, gradients = of_ours(model, batch)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-9)
    expected = as_released(expected, gradients.keys())
    assert gradients.keys() == expected.keys()
    norm_of_all = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-10 * expected[name].norm() + 1e-13 * norm_of_all, name


@pytest.mark.parametrize("flavor", FLAVORS)
def test_fp32_results_are_as_accurate_as_those_of_transformers(
    flavor: Any,
    shrunk: Any,
    build_model: Any,
    reference: Any,
    fp64_model: Any,
    batch: dict[str, Tensor],
    in_fp64: Any,
    within_rounding: Any,
) -> None:
    model = build_model(shrunk(flavor))
    theirs = reference(model)
    plain_logits, plain = of_theirs(theirs, batch, nullcontext())
    theirs.zero_grad()
    exact_logits, exact = of_theirs(fp64_model(theirs), batch, in_fp64())
    logits, gradients = of_ours(model, batch)
    plain, exact = as_released(plain, gradients.keys()), as_released(exact, gradients.keys())
    assert within_rounding(logits, plain_logits, exact_logits)
    assert gradients.keys() == exact.keys()
    assert [name for name, found in gradients.items() if not within_rounding(found, plain[name], exact[name])] == []


@pytest.mark.parametrize(
    ("flavor", "part"),
    [
        (gpt_oss_20b, "block.attention.sink_init"),
        (gpt_oss_20b, "block.attention.mask_modifiers"),
        (gpt_oss_20b, "block.attention.input.bias_init"),
        (gpt_oss_20b, "block.attention.output.bias_init"),
        (gpt_oss_20b, "block.feed_forward.router.bias_init"),
        (gpt_oss_20b, "block.feed_forward.experts.bias_init"),
        (gpt_oss_20b, "block.feed_forward.experts.gating"),
        (gpt_oss_20b, "block.feed_forward.experts.gating.alpha"),
        (gpt_oss_20b, "block.feed_forward.experts.gating.limit"),
        (gpt_oss_20b, "rope.scaling.truncate"),
        (gpt_oss_20b, "rope.scaling.attention_factor"),
        (qwen3_30b_a3b, "block.feed_forward.router.renormalize"),
        (qwen3_30b_a3b, "block.feed_forward.router.top_k"),
        (qwen3_30b_a3b, "block.feed_forward.router.score"),
        (deepseek_v3_671b, "block.feed_forward.router.balancing"),
        (deepseek_v3_671b, "block.feed_forward.router.groups"),
        (deepseek_v3_671b, "block.feed_forward.router.scale"),
        (deepseek_v2_236b, "block.feed_forward.router.groups.num_kept"),
        (deepseek_v2_236b, "block.feed_forward.shared"),
        (deepseek_v2_lite_16b, "rope.scaling.mscale_all_dim"),
        (deepseek_v2_lite_16b, "rope.scaling.factor"),
        (qwen3_8b, "block.attention.qk_norm"),
        (qwen3_8b, "rope.theta"),
        (llama3_8b, "rope.scaling"),
        (llama3_8b, "block.norm.eps"),
        (llama4_scout, "block.attention.mask_modifiers"),
        (llama4_scout, "block.attention.qk_norm"),
        (llama4_scout, "block.attention.rotation"),
        (llama4_scout, "block.feed_forward.weighted"),
        (llama4_scout, "block.feed_forward.shared"),
        (llama4_scout, "layer_overrides.3::4.attention.rotation"),
        (llama4_scout, "layer_overrides.3::4.attention.temperature"),
        (llama4_scout, "rope.scaling"),
    ],
)
def test_the_tests_detect_a_changed_setting(
    flavor: Any,
    part: str,
    shrunk: Any,
    build_model: Any,
    reference: Any,
    batch: dict[str, Tensor],
    in_fp64: Any,
) -> None:
    """The reference has the original setting; the model is built without it or with another value."""
    config = shrunk(flavor)
    model = build_model(config, torch.float64)
    their_model = reference(model, torch.float64)
    with torch.no_grad(), in_fp64():
        theirs = their_model(batch["tokens"]).logits
    without = {"theta": 10_000.0, "eps": 1e-3, "renormalize": False, "top_k": 2, "score": "sigmoid"}
    without |= {"mask_modifiers": [], "weighted": "output", "rotation": "halves"}
    without |= {"scale": 2.0, "num_kept": 3, "factor": 20.0}
    without |= {"gating": SiluGating.Config(), "alpha": 1.0, "limit": 1.0, "truncate": True, "attention_factor": 1.0}
    *parents, name = part.split(".")
    owner = functools.reduce(lambda o, n: o[n] if isinstance(o, dict) else getattr(o, n), parents, config)
    setattr(owner, name, without.get(name))
    other = config.build().double()
    other.load_state_dict({name: model.state_dict()[name] for name in other.state_dict()})
    with torch.no_grad():
        assert (other(**batch) - theirs).abs().max() > 1e-6


@pytest.mark.parametrize("flavor", [llama3_8b, qwen3_8b])
def test_logits_equal_without_scaling_and_with_other_theta(
    flavor: Any,
    shrunk: Any,
    build_model: Any,
    reference: Any,
    batch: dict[str, Tensor],
    in_fp64: Any,
) -> None:
    config = shrunk(flavor)
    config.rope = Rope.Config(dim=8, theta=20_000.0)
    model = build_model(config, torch.float64)
    their_model = reference(model, torch.float64)
    with torch.no_grad(), in_fp64():
        theirs = their_model(batch["tokens"]).logits
    torch.testing.assert_close(model(**batch), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flavor", [llama3_1b, gpt_oss_20b])
def test_logits_equal_far_from_the_start(
    flavor: Any,
    shrunk: Any,
    build_model: Any,
    reference: Any,
    batch: dict[str, Tensor],
    in_fp64: Any,
) -> None:
    model = build_model(shrunk(flavor), torch.float64)
    batch["positions"] = batch["positions"] + 900
    their_model = reference(model, torch.float64)
    with torch.no_grad(), in_fp64():
        theirs = their_model(batch["tokens"], position_ids=batch["positions"]).logits
    torch.testing.assert_close(model(**batch), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flavor", [llama3_8b, qwen3_30b_a3b, gpt_oss_20b])
def test_packed_documents_equal_transformers_on_each_document_alone(
    flavor: Any,
    shrunk: Any,
    build_model: Any,
    reference: Any,
    packed: dict[str, Tensor],
    in_fp64: Any,
) -> None:
    model = build_model(shrunk(flavor), torch.float64)
    their_model = reference(model, torch.float64)
    with torch.no_grad():
        logits = model(**packed)
        for row, ids in enumerate(packed["document_ids"]):
            for where in (ids == document for document in ids.unique()):
                with in_fp64():
                    alone = their_model(packed["tokens"][row, where][None]).logits[0]
                torch.testing.assert_close(logits[row, where], alone, rtol=0, atol=1e-9)


def test_the_tests_detect_scaled_positions_but_no_common_shift(
    shrunk: Any,
    build_model: Any,
    reference: Any,
    batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    in_fp64: Any,
) -> None:
    """RoPE is relative: a common shift of positions changes nothing, scaling them must."""
    model = build_model(shrunk(llama3_8b), torch.float64)
    their_model = reference(model, torch.float64)
    with torch.no_grad(), in_fp64():
        theirs = their_model(batch["tokens"]).logits
    forward = Rope.forward
    monkeypatch.setattr(Rope, "forward", lambda self, positions, dtype: forward(self, positions + 1, dtype))
    assert (model(**batch) - theirs).abs().max() < 1e-9
    monkeypatch.setattr(Rope, "forward", lambda self, positions, dtype: forward(self, positions * 2, dtype))
    assert (model(**batch) - theirs).abs().max() > 1e-4


def test_the_tests_detect_a_rotation_of_neighbors(
    shrunk: Any, build_model: Any, reference: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are paired across the halves of a head, not as neighbors."""
    model = build_model(shrunk(llama3_8b))
    theirs = reference(model, torch.float32)(batch["tokens"]).logits

    def neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)

    monkeypatch.setattr("titan_models.attention.grouped_query_attention.rotate", neighbors)
    assert (model(**batch) - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("flavor", TIED_AND_NOT)
def test_checkpoints_written_by_transformers_load(
    flavor: Any, shrunk: Any, batch: dict[str, Tensor], tmp_path: Path, fp64_model: Any, in_fp64: Any
) -> None:
    """Loaded from files that transformers wrote."""
    from safetensors.torch import load_file

    config = shrunk(flavor)
    adapter = config.hf_adapter()
    hf_config = adapter.hf_config()
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(hf_config.pop("model_type"), **hf_config), experts_implementation="eager"
    )
    theirs.save_pretrained(tmp_path)
    model = config.build()
    model.load_state_dict(adapter.from_hf(load_file(tmp_path / "model.safetensors")))
    model, theirs = model.double(), fp64_model(theirs)
    with torch.no_grad(), in_fp64():
        torch.testing.assert_close(model(**batch), theirs(batch["tokens"]).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_rope_frequencies_are_bitwise_those_of_transformers(flavor: Any) -> None:
    config = flavor()
    hf_config = transformers.LlamaConfig.from_dict(config.hf_adapter().hf_config() | {"head_dim": config.rope.dim})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config).inv_freq
    assert torch.equal(config.rope.build().frequencies, theirs)
