"""Features of Llama 4 alone: vision-language checkpoints, and positions that transformers counts differently."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from titan_models import RMSNorm, SlidingWindow, SwiGLU
from titan_models.llama4 import Llama4, llama4_debug, llama4_maverick, llama4_scout
from titan_models.moe import ClampedGating
from torch import Tensor


def theirs_like(model: Llama4, **changes: Any) -> Any:
    adapter = model.config.hf_adapter()
    hf_config = {**adapter.hf_config(), **changes}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(hf_config.pop("model_type"), **hf_config),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    theirs.double().load_state_dict(adapter.to_hf(model.state_dict()))
    return theirs


def test_block_types_are_those_of_the_released_models() -> None:
    """Every 4th block has no RoPE, the others are chunked; Scout has experts in all blocks, Maverick in every 2nd."""
    for flavor, with_experts in [(llama4_scout, [1, 1, 1, 1]), (llama4_maverick, [0, 1, 0, 1])]:
        hf_config = flavor().hf_adapter().hf_config()
        theirs = transformers.Llama4TextConfig(interleave_moe_layer_step=1 if all(with_experts) else 2)
        for name in (
            "no_rope_layers",
            "layer_types",
            "moe_layers",
            "attention_chunk_size",
            "floor_scale",
            "attn_scale",
        ):
            assert hf_config[name] == getattr(theirs, name), name
        assert [layer in hf_config["moe_layers"] for layer in range(48)] == [bool(each) for each in with_experts] * 12
        assert hf_config["use_qk_norm"] == (flavor is llama4_scout)
        blocks = flavor().blocks()
        assert [block.attention.rotation is None for block in blocks] == [False, False, False, True] * 12
        assert [block.attention.temperature is None for block in blocks] == [True, True, True, False] * 12
        assert [bool(block.attention.mask_modifiers) for block in blocks] == [True, True, True, False] * 12


def test_vision_language_checkpoints_load(shrunk: Any, build_model: Any) -> None:
    """Names have a prefix, there are vision weights, and gate and up of experts are one tensor, [expert, in, out]."""
    model = build_model(shrunk(llama4_scout))
    state, adapter = model.state_dict(), model.config.hf_adapter()
    text = adapter.to_hf(state)
    gate_up = text["model.layers.2.feed_forward.experts.gate_up_proj"]
    assert torch.equal(gate_up[7, :, :20], state["layers.2.feed_forward.experts.gate_proj.weight"][7].T)
    assert torch.equal(gate_up[7, :, 20:], state["layers.2.feed_forward.experts.up_proj.weight"][7].T)
    released = {f"language_model.{name}": tensor for name, tensor in text.items()}
    released["vision_model.class_embedding"] = released["multi_modal_projector.linear_1.weight"] = torch.zeros(3)
    for files in (text, released):
        back = adapter.from_hf(files)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=r"unexpected: audio_model\.weight"):
        adapter.from_hf(released | {"audio_model.weight": torch.zeros(3)})


def test_configs_that_llama4_does_not_support_are_rejected(shrunk: Any) -> None:
    for path, value, message in [
        (
            "attention.rotation",
            "halves",
            "must have no mask modifier besides one Chunks, and either rotation 'neighbors'",
        ),
        ("attention.qk_norm", RMSNorm.Config(), "no qk_norm with a weight"),
        ("attention.mask_modifiers", [SlidingWindow.Config(size=8)], "besides one Chunks"),
        ("feed_forward.weighted", "output", "weighted input"),
        ("feed_forward.router.score", "softmax", "score sigmoid"),
        ("feed_forward.experts.gating", ClampedGating.Config(), "SwiGLUExperts"),
        ("feed_forward.shared", SwiGLU.Config(hidden_dim=21), "shared expert of the same width"),
        ("feed_forward.router.top_k", 2, "must have the same MoE settings"),
        ("attention.num_kv_heads", 1, "must have the same num_kv_heads"),
    ]:
        config = shrunk(llama4_scout)
        *parents, name = path.split(".")
        for block in (
            [config.block] if "must have the same" in message else [config.block, *config.layer_overrides.values()]
        ):
            setattr(functools.reduce(getattr, parents, block), name, value)
        with pytest.raises(ValueError, match=message):
            config.hf_adapter()


@pytest.mark.parametrize("flavor", [llama4_debug, llama4_maverick])
def test_other_combinations_of_block_types_equal_transformers(
    flavor: Any, shrunk: Any, build_model: Any, in_fp64: Any
) -> None:
    """RoPE blocks with full attention, NoPE blocks in chunks, several experts per token, no temperature."""
    config = shrunk(flavor)
    tokens = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(0))
    for block in (config.block, *config.layer_overrides.values()):
        block.attention.temperature = None
        if isinstance(block.feed_forward, type(config.layer_overrides["1::4"].feed_forward)):
            block.feed_forward.router.top_k = 3
    config.layer_overrides["3::4"].attention.mask_modifiers, config.block.attention.mask_modifiers = (
        config.block.attention.mask_modifiers,
        [],
    )
    model = build_model(config, torch.float64)
    with torch.no_grad(), in_fp64():
        logits = model(tokens, torch.arange(50).expand(2, 50))
        torch.testing.assert_close(logits, theirs_like(model)(tokens).logits, rtol=0, atol=1e-9)


def test_temperature_uses_positions_in_the_document_unlike_transformers(
    shrunk: Any, build_model: Any, packed: dict[str, Tensor], in_fp64: Any
) -> None:
    """transformers computes the temperature from the index in the sequence, not from `position_ids`.

    Here it follows the position in the document, as rotation and chunks do, so that packing does not change a document.
    """
    model = build_model(shrunk(llama4_debug), torch.float64)
    row = {name: tensor[:1] for name, tensor in packed.items()}  # transformers takes no more

    def difference(theirs: Any) -> Tensor:
        with torch.no_grad(), in_fp64():
            expected = theirs(row["tokens"], position_ids=row["positions"], use_cache=False).logits
            return (model(**row) - expected)[0].abs().amax(-1)

    first = row["document_ids"][0] == row["document_ids"][0, 0]
    found = difference(theirs_like(model))
    assert found[first].max() < 1e-9
    assert found[~first].max() > 1e-5
    model.layers[3].attention.temperature = None
    assert difference(theirs_like(model, attn_temperature_tuning=False)).max() < 1e-9
