"""Features of GPT-OSS alone: sliding windows in every second block, its layout of experts, weights in MXFP4."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from titan_models import RMSNorm, SlidingWindow
from titan_models.gpt_oss import GptOss, gpt_oss_20b, gpt_oss_120b, gpt_oss_debug
from titan_models.moe import BalancingBias, SiluGating


@pytest.mark.parametrize("flavor", [gpt_oss_debug, gpt_oss_20b, gpt_oss_120b])
def test_even_layers_have_a_sliding_window_of_128_as_in_transformers(flavor: Callable[[], GptOss.Config]) -> None:
    config = flavor()
    for number, block in enumerate(config.blocks()):
        assert block.attention.mask_modifiers == ([] if number % 2 else [SlidingWindow.Config(size=128)])
    hf_config = config.hf_adapter().hf_config()
    theirs = transformers.GptOssConfig(num_hidden_layers=config.num_layers)
    assert (hf_config["layer_types"], hf_config["sliding_window"]) == (theirs.layer_types, theirs.sliding_window)
    for name in ("swiglu_alpha", "swiglu_limit", "head_dim", "num_experts_per_tok", "intermediate_size"):
        assert hf_config[name] == getattr(theirs, name)
    assert hf_config["rope_parameters"].items() >= theirs.rope_parameters.items()


def test_weights_survive_a_round_trip_through_hf_format(shrunk: Any, build_model: Any) -> None:
    state, adapter = build_model(shrunk(gpt_oss_20b)).state_dict(), shrunk(gpt_oss_20b).hf_adapter()
    theirs = adapter.to_hf(state)
    stem = "layers.1.feed_forward.experts"
    gate_up = theirs["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[5, :, 6], state[f"{stem}.gate_proj.weight"][5, 3])
    assert torch.equal(gate_up[5, :, 7], state[f"{stem}.up_proj.weight"][5, 3])
    assert torch.equal(
        theirs["model.layers.1.mlp.experts.gate_up_proj_bias"][5, 7], state[f"{stem}.up_proj.bias"][5, 3]
    )
    back = adapter.from_hf(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_mxfp4_experts_give_the_logits_of_transformers(
    shrunk: Any, build_model: Any, fp64_model: Any, in_fp64: Any
) -> None:
    config = shrunk(gpt_oss_20b)
    config.dim = 64
    for block in (config.block, *config.layer_overrides.values()):
        block.feed_forward.experts.hidden_dim = 32
    adapter, generator = config.hf_adapter(), torch.Generator().manual_seed(0)
    released = adapter.to_hf(build_model(config).state_dict())
    widened = dict(released)
    for name in [name for name in released if name.endswith("experts.gate_up_proj") or name.endswith(".down_proj")]:
        num_experts, columns, rows = released.pop(name).shape
        blocks = torch.randint(256, (num_experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(117, 123, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        released |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        convert = transformers.integrations.mxfp4.convert_moe_packed_tensors
        widened[name] = convert(blocks, scales, dtype=torch.float32)
    model = config.build()
    model.load_state_dict(adapter.from_hf(released))
    hf_config = adapter.hf_config()
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.GptOssConfig(**hf_config), attn_implementation="eager", experts_implementation="eager"
    )
    theirs.load_state_dict(widened)
    tokens = torch.randint(97, (2, 40), generator=generator)
    model, theirs = model.double(), fp64_model(theirs)
    with torch.no_grad(), in_fp64():
        logits = model(tokens, torch.arange(40).expand(2, 40))
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-9)


def test_a_bf16_router_selects_as_in_fp32_unlike_that_of_transformers(shrunk: Any, build_model: Any) -> None:
    router = build_model(shrunk(gpt_oss_20b), torch.bfloat16).layers[0].feed_forward.router
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.GptOssTopKRouter(
        transformers.GptOssConfig(**shrunk(gpt_oss_20b).hf_adapter().hf_config())
    )
    x = torch.randn(5000, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        narrow, wide = router(x)[0], copy.deepcopy(router).float()(x.float())[0]
        theirs.weight.copy_(router.weight)
        theirs.bias.copy_(router.bias)
        their_narrow, their_wide = theirs.bfloat16()(x)[2], theirs.float()(x.float())[2]
    assert torch.equal(narrow.sort().values, wide.sort().values)
    assert torch.equal(their_wide.sort().values, wide.sort().values)
    assert not torch.equal(their_narrow.sort().values, their_wide.sort().values)


def no_sinks(config: GptOss.Config) -> None:
    config.block.attention.sink_init = None


def no_bias(config: GptOss.Config) -> None:
    config.layer_overrides["1::2"].attention.output.bias_init = None


def a_norm(config: GptOss.Config) -> None:
    config.block.attention.qk_norm = RMSNorm.Config()


def two_modifiers(config: GptOss.Config) -> None:
    config.block.attention.mask_modifiers = [SlidingWindow.Config(size=3), SlidingWindow.Config(size=3)]


def other_windows(config: GptOss.Config) -> None:
    config.layer_overrides["1::2"].attention.mask_modifiers = [SlidingWindow.Config(size=3)]


def other_experts(config: GptOss.Config) -> None:
    config.block.feed_forward = copy.deepcopy(config.block.feed_forward)
    config.block.feed_forward.router.top_k = 2


def in_every_moe(path: str, value: Any) -> Callable[[GptOss.Config], None]:
    def change(config: GptOss.Config) -> None:
        for block in (config.block, *config.layer_overrides.values()):
            part, _, name = path.partition(".")
            setattr(getattr(block.feed_forward, part), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_sinks, "attention of GptOssForCausalLM must have sinks"),
        (no_bias, "attention of GptOssForCausalLM must have sinks"),
        (a_norm, "attention of GptOssForCausalLM must have sinks"),
        (two_modifiers, "attention of GptOssForCausalLM must have sinks"),
        (other_windows, "must have the same sliding windows"),
        (other_experts, "must have the same MoE settings"),
        (in_every_moe("experts.gating", SiluGating.Config()), "MoE layer of GptOssForCausalLM must have SwiGLUExperts"),
        (in_every_moe("experts.bias_init", None), "MoE layer of GptOssForCausalLM must have SwiGLUExperts"),
        (in_every_moe("router.renormalize", False), "MoE layer of GptOssForCausalLM must have SwiGLUExperts"),
        (
            in_every_moe("router.balancing", BalancingBias.Config()),
            "MoE layer of GptOssForCausalLM must have SwiGLUExperts",
        ),
    ],
)
def test_configs_that_gpt_oss_does_not_support_are_rejected(change: Any, message: str, shrunk: Any) -> None:
    config = shrunk(gpt_oss_20b)
    change(config)
    with pytest.raises(ValueError, match=message):
        config.hf_adapter()
