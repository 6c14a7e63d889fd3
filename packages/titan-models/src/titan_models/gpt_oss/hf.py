"""The Hugging Face adapter of GPT-OSS (`GptOssForCausalLM`)."""

from __future__ import annotations

from typing import Any

from titan_models.attention.base import Attention
from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.mask import SlidingWindow
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import COMMON_DEFAULTS, Settings, count_in, head_defaults
from titan_models.hugging_face.decoder import (
    CANNOT_CONVERT,
    GROUPED_QUERY_RULES,
    decoder_adapter,
    grouped_query_fields,
    same_in_all,
)
from titan_models.hugging_face.layout_transforms import Alternating, Transposed
from titan_models.hugging_face.rules import HfTensor, Rules
from titan_models.layers.feed_forward import FeedForward
from titan_models.moe import ClampedGating, MoE, SwiGLUExperts, TopKRouter

_ATTENTION_RULES: Rules = {
    **GROUPED_QUERY_RULES,
    "layers.*.attention.q_proj.bias": "model.layers.*.self_attn.q_proj.bias",
    "layers.*.attention.k_proj.bias": "model.layers.*.self_attn.k_proj.bias",
    "layers.*.attention.v_proj.bias": "model.layers.*.self_attn.v_proj.bias",
    "layers.*.attention.o_proj.bias": "model.layers.*.self_attn.o_proj.bias",
    "layers.*.attention.sinks": "model.layers.*.self_attn.sinks",
}
_MOE_RULES: Rules = {
    "layers.*.feed_forward.router.weight": "model.layers.*.mlp.router.weight",
    "layers.*.feed_forward.router.bias": "model.layers.*.mlp.router.bias",
    ("layers.*.feed_forward.experts.gate_proj.weight", "layers.*.feed_forward.experts.up_proj.weight"): HfTensor(
        "model.layers.*.mlp.experts.gate_up_proj", Alternating(dim=-2), Transposed()
    ),
    ("layers.*.feed_forward.experts.gate_proj.bias", "layers.*.feed_forward.experts.up_proj.bias"): HfTensor(
        "model.layers.*.mlp.experts.gate_up_proj_bias", Alternating(dim=-1)
    ),
    "layers.*.feed_forward.experts.down_proj.weight": HfTensor("model.layers.*.mlp.experts.down_proj", Transposed()),
    "layers.*.feed_forward.experts.down_proj.bias": "model.layers.*.mlp.experts.down_proj_bias",
}


def _layer_types(config: Settings) -> Any:
    layer_types = [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(count_in(config, "num_hidden_layers"))
    ]
    return layer_types if config.get("layer_types") is None else config["layer_types"]


_HF_DEFAULTS = {
    **{**COMMON_DEFAULTS, **head_defaults(64, 8, 64), "rms_norm_eps": 1e-5, "num_experts_per_tok": 4},
    **{"layer_types": _layer_types, "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "rope_theta": 150_000.0,
    "rope_parameters": {
        **{"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    },
}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """Return the adapter of a model. Raises ValueError for a config that the transformers class does not support."""
    blocks = config.blocks()
    hf_config = {
        **grouped_query_fields(config),
        **_window_fields([block.attention for block in blocks]),
        **same_in_all("MoE settings", [_moe_fields(block.feed_forward) for block in blocks]),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
    }
    return decoder_adapter(config, hf_config, rules=_ATTENTION_RULES | _MOE_RULES, hf_defaults=_HF_DEFAULTS)


def _window_fields(attentions: list[Attention.Config]) -> dict[str, Any]:
    if not all(_is_supported_attention(attention) for attention in attentions):
        raise ValueError(
            f"{CANNOT_CONVERT}attention of GptOssForCausalLM must have sinks, biases in all projections, rotation "
            "'halves', no qk_norm, no temperature, and no mask modifier besides one SlidingWindow, got "
            f"{next(attention for attention in attentions if not _is_supported_attention(attention))}."
        )
    sizes = [
        modifier.size
        for attention in attentions
        for modifier in attention.mask_modifiers
        if isinstance(modifier, SlidingWindow.Config)
    ]
    return {
        "layer_types": [
            "sliding_attention" if attention.mask_modifiers else "full_attention" for attention in attentions
        ],
        "sliding_window": same_in_all("sliding windows", sizes) if sizes else 128,  # unused, but must be a number
    }


def _is_supported_attention(attention: Attention.Config) -> bool:
    if not isinstance(attention, GroupedQueryAttention.Config):
        return False
    has_all = None not in (attention.input.bias_init, attention.output.bias_init, attention.sink_init)
    is_plain = (attention.qk_norm, attention.temperature, attention.rotation) == (None, None, "halves")
    modifiers = [type(modifier) for modifier in attention.mask_modifiers]
    return has_all and is_plain and modifiers in ([], [SlidingWindow.Config])


def _moe_fields(moe: Any) -> dict[str, Any]:
    if not _is_supported_moe(moe):
        raise ValueError(
            f"{CANNOT_CONVERT}an MoE layer of GptOssForCausalLM must have SwiGLUExperts with ClampedGating, biases and "
            "weighted output, a TopKRouter with a bias, score softmax, renormalize, scale 1, no groups and no "
            f"balancing bias, and no shared experts, got {moe}."
        )
    router, experts = moe.router, moe.experts
    return {
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "intermediate_size": experts.hidden_dim,
        "swiglu_alpha": experts.gating.alpha,
        "swiglu_limit": experts.gating.limit,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }


def _is_supported_moe(moe: FeedForward.Config) -> bool:
    if not isinstance(moe, MoE.Config) or moe.shared is not None:
        return False
    router, experts = moe.router, moe.experts
    if not (isinstance(router, TopKRouter.Config) and isinstance(experts, SwiGLUExperts.Config)):
        return False
    has_biases = None not in (router.bias_init, experts.bias_init)
    is_plain = (router.score, router.renormalize, router.scale) == ("softmax", True, 1.0)
    is_limited = router.groups is not None or router.balancing is not None
    is_gated = moe.weighted == "output" and isinstance(experts.gating, ClampedGating.Config)
    return has_biases and is_plain and not is_limited and is_gated
