"""The config.json of a checkpoint must describe the model; errors state the differences."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from titan_models.deepseek import deepseek_debug, deepseek_v2_lite_16b, deepseek_v3_671b, deepseek_v3_debug
from titan_models.gpt_oss import gpt_oss_20b, gpt_oss_debug
from titan_models.llama3 import llama3_8b, llama3_debug
from titan_models.llama4 import llama4_debug, llama4_scout
from titan_models.qwen3 import qwen3_8b, qwen3_30b_a3b, qwen3_debug, qwen3_moe_debug

LLAMA3_8B = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "use_cache": True},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "attention_bias": False, "attention_dropout": 0.0},
    **{"mlp_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-05, "initializer_range": 0.02},
    **{"bos_token_id": 128000, "eos_token_id": 128001, "pretraining_tp": 1, "tie_word_embeddings": False},
    **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "transformers_version": "4.43.0.dev0"},
    "rope_scaling": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
        "original_max_position_embeddings": 8192,
    },
}
QWEN3_8B = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "head_dim": 128},
    **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "attention_bias": False, "max_window_layers": 36},
    **{"bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960},
    **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False},
    **{"hidden_act": "silu", "tie_word_embeddings": False},
}
QWEN3_30B_A3B = QWEN3_8B | {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1},
    **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48},
    **{"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    **{"mlp_only_layers": [], "output_router_logits": False, "router_aux_loss_coef": 0.001, "max_window_layers": 48},
}
DEEPSEEK_V3 = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1, "rope_theta": 10000},
    **{"hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "vocab_size": 129280},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3},
    **{"moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True, "num_nextn_predict_layers": 1},
    **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-06},
    **{"hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 163840, "torch_dtype": "bfloat16"},
    "quantization_config": {
        **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    },
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
        "original_max_position_embeddings": 4096,
    },
}
DEEPSEEK_V2_LITE = DEEPSEEK_V3 | {
    **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None},
    **{"hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "vocab_size": 102400},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408, "n_routed_experts": 64},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False},
    **{"routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "first_k_dense_replace": 1},
    **{"aux_loss_alpha": 0.001, "seq_aux": True, "quantization_config": None},
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
LLAMA4_SCOUT = {
    **{"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "vision_config": {"depth": 34}},
    "text_config": {
        **{"model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384},
        **{"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128},
        **{"vocab_size": 202048, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
        **{"attention_chunk_size": 8192, "attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192},
        **{"no_rope_layers": [], "use_qk_norm": True, "rms_norm_eps": 1e-05, "rope_theta": 500000.0},
        **{"attention_bias": False, "router_jitter_noise": 0.0, "max_position_embeddings": 10485760},
        "rope_scaling": {
            **{"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
    },
}
GPT_OSS_20B = {
    **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64},
    **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "vocab_size": 201088},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4},
    **{"experts_per_token": 4, "initial_context_length": 4096, "max_position_embeddings": 131072, "hidden_act": "silu"},
    **{"sliding_window": 128, "swiglu_limit": 7.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False},
    **{"eos_token_id": 200002, "pad_token_id": 199999, "router_aux_loss_coef": 0.9, "output_router_logits": False},
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]},
    "rope_theta": 150000,
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
        "original_max_position_embeddings": 4096,
    },
}
RELEASED = [
    (gpt_oss_20b, GPT_OSS_20B),
    (llama3_8b, LLAMA3_8B),
    (qwen3_8b, QWEN3_8B),
    (qwen3_30b_a3b, QWEN3_30B_A3B),
    (deepseek_v3_671b, DEEPSEEK_V3),
    (deepseek_v2_lite_16b, DEEPSEEK_V2_LITE),
    (llama4_scout, LLAMA4_SCOUT),
]


@functools.cache
def adapter_and_checkpoint(flavor: Any) -> Any:
    with torch.device("meta"):
        state = flavor().build().state_dict()
    adapter = flavor().hf_adapter()
    return adapter, adapter.to_hf(state)


def found(flavor: Any, config: dict[str, Any]) -> Any:
    """Return the mappings for a checkpoint with the tensors of the model and this config.json."""
    adapter, checkpoint = adapter_and_checkpoint(flavor)
    return adapter.find(checkpoint, config)


@pytest.mark.parametrize(("flavor", "config"), RELEASED)
def test_the_released_config_json_matches_the_flavor(flavor: Any, config: dict[str, Any]) -> None:
    assert found(flavor, config)


@pytest.mark.parametrize(
    "flavor",
    [
        *(deepseek_debug, deepseek_v3_debug, gpt_oss_debug, llama3_debug, llama4_debug, qwen3_debug, qwen3_moe_debug),
    ],
)
def test_the_config_json_that_transformers_writes_matches_the_flavor(flavor: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    own = flavor().hf_adapter().hf_config()
    assert found(flavor, own)
    assert found(flavor, transformers.AutoConfig.for_model(own.pop("model_type"), **own).to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mistral"},
            "model_type of config.json must be 'llama'.*got 'mistral'",
        ),
        ({"model_type": None}, "model_type of config.json must be .*got None"),
        ({"num_hidden_layers": 16, "hidden_size": 2048}, "hidden_size 2048 instead of 4096, num_hidden_layers 16"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 instead of 1e-05"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True instead of False"),
        ({"rope_theta": 10000.0}, "rope_theta 10000.0 instead of 500000.0"),
        ({"rope_scaling": None}, "rope_type 'default' instead of 'llama3'"),
        (
            {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
            "rope_type of config.json must be one of default, llama3, yarn, got 'spiral'",
        ),
        ({"rope_scaling": LLAMA3_8B["rope_scaling"] | {"factor": 32.0}}, "factor 32.0 instead of 8"),
        ({"rope_scaling": LLAMA3_8B["rope_scaling"] | {"mscale": 2.0}}, "mscale 2.0 instead of None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method of config.json must be fp8 .* got 'awq'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            r"weight_block_size of config.json .* got \[128\]",
        ),
    ],
)
def test_the_config_of_another_model_is_rejected_with_the_differences(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(llama3_8b, copy.deepcopy(LLAMA3_8B) | changes)


def test_rope_settings_of_transformers_5_are_read() -> None:
    config = {key: value for key, value in LLAMA3_8B.items() if not key.startswith("rope")}
    rope = {**LLAMA3_8B["rope_scaling"], "rope_theta": 500000.0}
    assert found(llama3_8b, config | {"rope_parameters": rope})
    with pytest.raises(ValueError, match="rope_theta"):
        found(llama3_8b, config | {"rope_parameters": rope | {"rope_theta": 1e4}})


def test_yarn_without_mscale_is_another_rope() -> None:
    config = copy.deepcopy(DEEPSEEK_V3)
    del config["rope_scaling"]["mscale"]
    with pytest.raises(ValueError, match=r"mscale None instead of 1\.0"):
        found(deepseek_v3_671b, config)


def test_the_text_config_of_a_vision_language_model_is_checked() -> None:
    config = copy.deepcopy(LLAMA4_SCOUT)
    config["text_config"]["num_local_experts"] = 128
    with pytest.raises(ValueError, match="num_local_experts 128 instead of 16"):
        found(llama4_scout, config)
