"""GPT-OSS as transformers' `GptOssForCausalLM` names it."""

from __future__ import annotations

from typing import Any

from titan_models.attention.base import Attention
from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.mask import SlidingWindow
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import LEFT_OUT, Settings, count_in, heads_left_out
from titan_models.hugging_face.decoder import GROUPED_QUERY_RULES, decoder_adapter, grouped_query_fields, same_in_all
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


def _kinds_of_layers(config: Settings) -> Any:
    kinds = [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(count_in(config, "num_hidden_layers"))
    ]
    return kinds if config.get("layer_types") is None else config["layer_types"]


_LEFT_OUT = {
    **{**LEFT_OUT, **heads_left_out(64, 8, 64), "rms_norm_eps": 1e-5, "num_experts_per_tok": 4},
    **{"layer_types": _kinds_of_layers, "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "rope_theta": 150_000.0,
    "rope_parameters": {
        **{"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    },
}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """The adapter of a model. Raises ValueError for a model that `GptOssForCausalLM` cannot be."""
    blocks = config.blocks()
    hf_config = {
        **grouped_query_fields(config),
        **_window_fields([block.attention for block in blocks]),
        **same_in_all("mixtures of experts", [_moe_fields(block.feed_forward) for block in blocks]),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
    }
    return decoder_adapter(config, hf_config, rules=_ATTENTION_RULES | _MOE_RULES, left_out=_LEFT_OUT)


def _window_fields(attentions: list[Attention.Config]) -> dict[str, Any]:
    if not all(_is_gpt_osss_attention(attention) for attention in attentions):
        raise ValueError(
            "Got attention with other mask_modifiers than one SlidingWindow, with norms, a temperature or another rotation, or "
            "without sinks or some biases. transformers' GptOssForCausalLM has sinks, biases and rotated halves alone. "
            "Make it that to export the model."
        )
    sizes = [
        limit.size
        for attention in attentions
        for limit in attention.mask_modifiers
        if isinstance(limit, SlidingWindow.Config)
    ]
    return {
        "layer_types": [
            "sliding_attention" if attention.mask_modifiers else "full_attention" for attention in attentions
        ],
        "sliding_window": same_in_all("windows", sizes) if sizes else 128,  # not used: it must be a number
    }


def _is_gpt_osss_attention(attention: Attention.Config) -> bool:
    if not isinstance(attention, GroupedQueryAttention.Config):
        return False
    has_all = None not in (attention.input.bias_init, attention.output.bias_init, attention.sink_init)
    rotates_alone = (attention.qk_norm, attention.temperature, attention.rotation) == (None, None, "halves")
    kinds = [type(limit) for limit in attention.mask_modifiers]
    return has_all and rotates_alone and kinds in ([], [SlidingWindow.Config])


def _moe_fields(moe: Any) -> dict[str, Any]:
    if not _is_gpt_osss_moe(moe):
        raise ValueError(
            f"Got {moe}. transformers' GptOssForCausalLM has SwiGLUExperts with ClampedGating, chosen by a TopKRouter "
            "by their renormalized softmax alone, biases in both, and no shared experts. Make it that to export the "
            "model."
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


def _is_gpt_osss_moe(moe: FeedForward.Config) -> bool:
    if not isinstance(moe, MoE.Config) or moe.shared is not None:
        return False
    router, experts = moe.router, moe.experts
    if not (isinstance(router, TopKRouter.Config) and isinstance(experts, SwiGLUExperts.Config)):
        return False
    has_biases = None not in (router.bias_init, experts.bias_init)
    chosen = (router.score, router.renormalize, router.scale) == ("softmax", True, 1.0)
    limited = router.groups is not None or router.balancing is not None
    gated = moe.weighted == "output" and isinstance(experts.gating, ClampedGating.Config)
    return has_biases and chosen and not limited and gated
