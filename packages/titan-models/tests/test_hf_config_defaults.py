"""Missing settings and variants of a config.json are read as transformers reads them, or are errors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from titan_models.decoder import Decoder
from titan_models.deepseek import deepseek_debug, deepseek_v3_debug
from titan_models.gpt_oss import gpt_oss_debug
from titan_models.hugging_face.config_check import check_config
from titan_models.hugging_face.config_reading import read_config, read_rope
from titan_models.layers.yarn import Yarn
from titan_models.llama3 import llama3_debug
from titan_models.llama4 import llama4_debug
from titan_models.moe import ClampedGating
from titan_models.qwen3 import qwen3_debug, qwen3_moe_debug

FLAVORS = (llama3_debug, qwen3_debug, qwen3_moe_debug, deepseek_debug, deepseek_v3_debug, llama4_debug, gpt_oss_debug)
SIZES = {"hidden_size", "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "num_hidden_layers"}
SIZES |= {"vocab_size", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
SIZES |= {"n_routed_experts", "num_experts", "num_local_experts", "n_shared_experts", "first_k_dense_replace"}
"""Settings that weight shapes determine."""
BIASES = {"attention_bias", "mlp_bias"}  # weights of their own
OF_NO_FUNCTION = {"initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "use_cache"}
OF_NO_FUNCTION |= {"max_position_embeddings", "num_nextn_predict_layers", "router_jitter_noise", "architectures"}
OF_NO_FUNCTION |= {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "model_type", "rope_parameters"}


@pytest.fixture(params=FLAVORS, ids=lambda flavor: flavor.__name__)
def adapter(request: pytest.FixtureRequest) -> Any:
    return request.param().hf_adapter()


def to_transformers(stated: dict[str, Any]) -> dict[str, Any]:
    """Return the config that transformers reads from these settings."""
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(stated))
        config = transformers.AutoConfig.from_pretrained(folder)
    config.standardize_rope_params()  # as its rotary embeddings do
    return config.to_dict()


def test_each_missing_setting_that_shapes_do_not_determine_has_the_default_of_transformers(adapter: Any) -> None:
    own = adapter.hf_config()
    stated = {"model_type": own["model_type"], "hidden_size": 512, "num_hidden_layers": 12}
    judge, read = to_transformers(stated), read_config(stated, adapter._hf_defaults, sizes=own)
    compared = (own.keys() & judge.keys()) - SIZES - BIASES - OF_NO_FUNCTION
    assert compared
    assert {key: read.get(key, "not known") for key in compared} == {key: judge[key] for key in compared}
    rope = read_rope(stated, adapter._hf_defaults)
    assert {"beta_fast": 32.0, "beta_slow": 1.0, **rope} == {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **judge["rope_parameters"],
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("flavor", "stated"),
    [
        (llama3_debug, {"num_attention_heads": 8, "num_key_value_heads": None, "head_dim": None}),
        (qwen3_moe_debug, {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        (qwen3_moe_debug, {"decoder_sparse_step": 3, "mlp_only_layers": None}),
        (llama4_debug, {"no_rope_layers": [], "no_rope_layer_interval": 3}),
        (llama4_debug, {"no_rope_layers": None, "interleave_moe_layer_step": 2}),
        (llama4_debug, {"no_rope_layers": [0, 1] * 6, "moe_layers": [], "layer_types": None}),
        (gpt_oss_debug, {"layer_types": None}),
    ],
)
def test_settings_that_follow_from_others_equal_transformers(flavor: Any, stated: dict[str, Any]) -> None:
    adapter = flavor().hf_adapter()
    stated = {"model_type": adapter.hf_config()["model_type"], "hidden_size": 512, "num_hidden_layers": 12} | stated
    judge, read = to_transformers(stated), read_config(stated, adapter._hf_defaults, sizes={})
    followed = {key for key in read.keys() & judge.keys() if key in adapter._hf_defaults} - {"mlp_only_layers"}
    followed -= {"decoder_sparse_step", "rope_parameters"}
    assert {key: read[key] for key in followed} == {key: judge[key] for key in followed}
    if "mlp_only_layers" in read:  # the layers that transformers' Qwen3MoeDecoderLayer makes dense
        listed, step = judge["mlp_only_layers"], judge["decoder_sparse_step"]
        assert read["mlp_only_layers"] == [n for n in range(12) if n in listed or (n + 1) % step != 0]
        assert read["decoder_sparse_step"] == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": None},
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
        {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 3e4},
        {"rope_parameters": {**YARN, "rope_theta": 7e4}, "original_max_position_embeddings": 128},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 256},
        {"rope_parameters": {**YARN, "truncate": None}},
        {"rope_scaling": {}},
        {"rope_parameters": {}},
        {"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 2e4},
        {"rope_scaling": {**YARN, "beta_fast": None, "mscale": None, "attention_factor": None}},
        {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ],
)
def test_rope_settings_are_read_as_transformers_reads_them(rope: dict[str, Any], adapter: Any) -> None:
    stated = {"model_type": adapter.hf_config()["model_type"], "hidden_size": 512, "num_hidden_layers": 12} | rope
    judge = to_transformers(stated)["rope_parameters"]
    judge = {key: value for key, value in judge.items() if key != "type" and value is not None}
    if "truncate" in (rope.get("rope_parameters") or {}):
        judge["truncate"] = False  # not None to transformers' `if truncate`
    usual = {"beta_fast": 32.0, "beta_slow": 1.0}
    assert usual | read_rope(stated, adapter._hf_defaults) == usual | judge


def test_aliases_and_irrelevant_settings_are_accepted(adapter: Any) -> None:
    """In transformers `swish` is an alias of `silu`, and the other settings change no layer."""
    activations = pytest.importorskip("transformers.activations", reason="the judge of this test")
    x = torch.linspace(-9, 9, 1001)
    assert torch.equal(activations.ACT2FN["swish"](x), activations.ACT2FN["silu"](x))
    own = adapter.hf_config()
    said_otherwise = {
        **{"hidden_act": "swish", "quantization_config": {}, "torch_dtype": "bfloat16", "rope_scaling": {}},
        **{"_name_or_path": "x", "id2label": {"0": "a"}, "pretraining_tp": 1, "auto_map": {}, "dtype": "float16"},
    }
    check_config({**own, **said_otherwise}, own, adapter._hf_defaults)
    check_config({**own, "quantization_config": None, "rope_scaling": None}, own, adapter._hf_defaults)
    for name in ("gelu", "silu_and_mul", None):
        with pytest.raises(ValueError, match=f"hidden_act {name!r} instead of 'silu'"):
            check_config({**own, "hidden_act": name}, own, adapter._hf_defaults)


@pytest.mark.parametrize(
    ("flavor", "changes", "message"),
    [
        (llama3_debug, {"rope_parameters": None, "rope_theta": None}, "rope_theta None instead of"),
        (llama3_debug, {"rope_parameters": None}, r"rope_theta 10000\.0 instead of 500000\.0"),
        (llama3_debug, {"rope_scaling": YARN}, "rope_type 'yarn'"),
        (
            llama3_debug,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type of config.json must be .* got 'dynamic'",
        ),
        (llama3_debug, {"rope_scaling": {"rope_type": None}}, "rope_type of config.json must be .* got None"),
        (
            llama3_debug,
            {"rope_scaling": "yarn"},
            "rope_scaling of config.json must be a JSON object or null, got 'yarn'",
        ),
        (llama3_debug, {"quantization_config": ["fp8"]}, "quantization_config of config.json must be a JSON object"),
        (llama3_debug, {"quantization_config": {"quant_method": ["fp8"]}}, "quant_method of config.json"),
        (llama3_debug, {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size"),
        (llama3_debug, {"hidden_size": "wide", "head_dim": None}, "hidden_size of .* whole number .* got 'wide'"),
        (gpt_oss_debug, {"num_hidden_layers": 10**4000, "layer_types": None}, "got a number of 13288 bits"),
        (llama3_debug, {"model_type": ["llama"]}, r"model_type .* got \['llama'\]"),
        (llama4_debug, {"text_config": [1]}, "text_config of config.json must be a JSON object"),
        (deepseek_v3_debug, {"norm_topk_prob": None}, "norm_topk_prob None instead of True"),
        (deepseek_v3_debug, {"rope_interleave": None}, "rope_interleave None instead of True"),
        (llama4_debug, {"no_rope_layers": [], "no_rope_layer_interval": 2, "layer_types": None}, "no_rope_layers"),
        (gpt_oss_debug, {"sliding_window": None}, "sliding_window None instead of"),
    ],
)
def test_settings_of_another_function_in_transformers_are_rejected(
    flavor: Any, changes: dict[str, Any], message: str
) -> None:
    adapter = flavor().hf_adapter()
    with torch.device("meta"):
        weights = adapter.to_hf(flavor().build().state_dict())
    with pytest.raises(ValueError, match=message):
        adapter.find(weights, adapter.hf_config() | changes)


@pytest.mark.parametrize(
    ("flavor", "key"),
    [
        (llama3_debug, "rms_norm_eps"),
        (deepseek_debug, "num_experts_per_tok"),
        (llama4_debug, "attention_chunk_size"),
        (qwen3_moe_debug, "num_experts_per_tok"),
    ],
)
def test_a_missing_setting_is_compared_as_its_default(flavor: Any, key: str) -> None:
    adapter = flavor().hf_adapter()
    own = adapter.hf_config()
    assert own[key] != adapter._hf_defaults[key]
    with pytest.raises(ValueError, match=f"{key} .* instead of"):
        check_config({name: value for name, value in own.items() if name != key}, own, adapter._hf_defaults)


def changed(flavor: Any, change: Callable[[Any], None]) -> Decoder.Config:
    config = flavor()
    change(config)
    return config


def every(path: str, **changes: Any) -> Callable[[Any], None]:
    """Return a function that sets fields of the module `path` of each block."""

    def change(config: Any) -> None:
        for block in (config.block, *config.layer_overrides.values()):
            owner = block
            for name in path.split("."):
                owner = getattr(owner, name, None)
            for name, value in changes.items():
                if owner is not None and hasattr(owner, name):
                    setattr(owner, name, value)

    return change


def scaled_by_yarn(config: Any) -> None:
    config.rope.scaling = Yarn.Config(factor=4.0, original_max_seq_len=64)


@pytest.mark.parametrize(
    ("flavor", "change", "message"),
    [
        (qwen3_moe_debug, every("feed_forward", weighted="input"), "Qwen3MoeForCausalLM .*weighted output"),
        (qwen3_moe_debug, every("feed_forward.experts", gating=ClampedGating.Config()), "with SiluGating"),
        (deepseek_debug, every("feed_forward", weighted="input"), "SiluGating and weighted output"),
        (deepseek_v3_debug, every("feed_forward.experts", gating=ClampedGating.Config()), "with SiluGating"),
        (llama4_debug, every("feed_forward", weighted="output"), "Llama4ForCausalLM .*weighted input"),
        (gpt_oss_debug, every("feed_forward", weighted="input"), "GptOssForCausalLM .*weighted output"),
        (llama4_debug, scaled_by_yarn, "attention_factor of the RoPE scaling must be 1"),
        (llama3_debug, lambda config: setattr(config.block.norm, "weight_init", None), "norms .* must have a weight"),
        (deepseek_debug, lambda config: setattr(config.norm, "weight_init", None), "norms .* must have a weight"),
        (
            llama3_debug,
            lambda config: setattr(config, "dim", config.dim + 4),
            "dim must be a multiple of the number of heads",
        ),
        (deepseek_debug, lambda config: setattr(config, "mtp", True), "has no MTP layer"),
    ],
)
def test_a_config_that_transformers_does_not_support_has_no_adapter(flavor: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(flavor, change).hf_adapter()


def test_blocks_that_differ_only_in_initialization_are_exported() -> None:
    def other_init(config: Any) -> None:
        for layer in (0, 1):
            block = config.blocks()[layer]
            block.feed_forward.experts.down_init.std *= 1 + layer
            config.layer_overrides[str(layer)] = block

    assert changed(qwen3_moe_debug, other_init).hf_adapter().hf_config()["mlp_only_layers"] == []


def test_an_export_without_sliding_windows_still_has_a_window_size() -> None:
    adapter = changed(gpt_oss_debug, every("attention", mask_modifiers=[])).hf_adapter()
    own = adapter.hf_config()
    assert {*own["layer_types"]} == {"full_attention"}
    assert isinstance(own["sliding_window"], int)  # transformers builds the mask even if no layer uses it
    with pytest.raises(ValueError, match="layer_types"):  # missing: the default is every second layer
        check_config({**own, "layer_types": None}, own, adapter._hf_defaults)
