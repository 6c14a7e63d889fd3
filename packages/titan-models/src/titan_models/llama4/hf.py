"""The Hugging Face adapter of Llama 4 (`Llama4ForCausalLM`, also nested in vision-language checkpoints)."""

from __future__ import annotations

from typing import Any

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.mask import Chunks
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter, NestedCheckpoint
from titan_models.hugging_face.config_reading import COMMON_DEFAULTS, Settings, count_in, head_defaults
from titan_models.hugging_face.decoder import (
    CANNOT_CONVERT,
    GROUPED_QUERY_RULES,
    decoder_adapter,
    dense_hidden_dim,
    grouped_queries,
    head_fields,
    same_in_all,
)
from titan_models.hugging_face.layout_transforms import Halves, Transposed
from titan_models.hugging_face.rules import HfTensor, Rules
from titan_models.moe import MoE, SiluGating, SwiGLUExperts, TopKRouter

_DENSE_RULES: Rules = {
    f"layers.*.feed_forward.{name}_proj.weight": f"model.layers.*.feed_forward.{name}_proj.weight"
    for name in ("gate", "up", "down")
}
_SHARED_RULES: Rules = {
    f"layers.*.feed_forward.shared.{name}_proj.weight": f"model.layers.*.feed_forward.shared_expert.{name}_proj.weight"
    for name in ("gate", "up", "down")
}
_MOE_RULES: Rules = {
    "layers.*.feed_forward.router.weight": "model.layers.*.feed_forward.router.weight",
    ("layers.*.feed_forward.experts.gate_proj.weight", "layers.*.feed_forward.experts.up_proj.weight"): HfTensor(
        "model.layers.*.feed_forward.experts.gate_up_proj", Halves(dim=-2), Transposed()
    ),
    "layers.*.feed_forward.experts.down_proj.weight": HfTensor(
        "model.layers.*.feed_forward.experts.down_proj", Transposed()
    ),
    **_SHARED_RULES,
}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """Return the adapter of a model. Raises ValueError for a config that the transformers class does not support."""
    feed_forwards = {layer: block.feed_forward for layer, block in enumerate(config.blocks())}
    moes = {
        layer: feed_forward for layer, feed_forward in feed_forwards.items() if isinstance(feed_forward, MoE.Config)
    }
    dense = [feed_forward for layer, feed_forward in feed_forwards.items() if layer not in moes]
    hf_config: dict[str, Any] = {
        **_attention_fields(config),
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "moe_layers": [*moes],
    }
    if moes:
        hf_config |= same_in_all("MoE settings", [_moe_fields(moe) for moe in moes.values()])
    if dense:
        hf_config["intermediate_size_mlp"] = dense_hidden_dim(dense)
    rules = GROUPED_QUERY_RULES | (_MOE_RULES if moes else {}) | (_DENSE_RULES if dense else {})
    nested = NestedCheckpoint("language_model.", others=("vision_model.", "multi_modal_projector."))
    return decoder_adapter(config, hf_config, rules, nested=nested, hf_defaults=_HF_DEFAULTS)


def _moe_layers(config: Settings) -> Any:
    step, stated = count_in(config, "interleave_moe_layer_step", 1), config.get("moe_layers")
    return [*range(step - 1, count_in(config, "num_hidden_layers"), step)] if stated is None else stated


def _rope_layers(config: Settings) -> Any:
    interval, layers = count_in(config, "no_rope_layer_interval", 4), range(count_in(config, "num_hidden_layers"))
    return config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]


def _layer_types(config: Settings) -> Any:
    layer_types = ["chunked_attention" if rotates else "full_attention" for rotates in config["no_rope_layers"]]
    return layer_types if config.get("layer_types") is None else config["layer_types"]


_HF_DEFAULTS = {
    **{**COMMON_DEFAULTS, **head_defaults(40, 8, 128), "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    **{"moe_layers": _moe_layers, "no_rope_layers": _rope_layers, "layer_types": _layer_types},
    **{"num_experts_per_tok": 1, "attention_chunk_size": 8192, "use_qk_norm": True},
    **{"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1},
}


def _attention_fields(config: Decoder.Config) -> dict[str, Any]:
    attentions = grouped_queries(config)
    for attention in attentions:
        if not (_is_rope_attention(attention) or _is_nope_attention(attention)):
            raise ValueError(
                f"{CANNOT_CONVERT}attention of Llama4ForCausalLM must have no mask modifier besides one Chunks, and "
                "either rotation 'neighbors', no temperature and no qk_norm with a weight, or no rotation and no "
                f"qk_norm, got {attention}."
            )
    scaling = config.rope.scaling
    if any(each.qk_norm for each in attentions) and scaling is not None and scaling.build().attention_factor() != 1.0:
        raise ValueError(
            f"{CANNOT_CONVERT}with qk_norm the attention_factor of the RoPE scaling must be 1, since Llama4ForCausalLM "
            f"applies the norm after it, got {scaling.build().attention_factor()}."
        )
    rope = [attention for attention in attentions if attention.rotation is not None]
    nope = [attention for attention in attentions if attention.rotation is None]
    fields = {
        **head_fields(config),
        "no_rope_layers": [int(attention.rotation is not None) for attention in attentions],
        "layer_types": [
            "chunked_attention" if attention.mask_modifiers else "full_attention" for attention in attentions
        ],
        "use_qk_norm": bool(rope) and same_in_all("qk_norm", [each.qk_norm for each in rope]) is not None,
    }
    if chunks := [modifier for attention in attentions for modifier in attention.mask_modifiers]:
        fields["attention_chunk_size"] = same_in_all("chunk size", chunks).size
    temperature = same_in_all("temperature", [each.temperature for each in nope]) if nope else None
    fields["attn_temperature_tuning"] = temperature is not None
    if temperature is not None:
        fields |= {"floor_scale": temperature.step, "attn_scale": temperature.strength}
    return fields


def _is_rope_attention(attention: GroupedQueryAttention.Config) -> bool:
    norm = attention.qk_norm
    norm_has_no_weight = norm is None or norm.weight_init is None
    return (
        _is_chunked_or_full(attention)
        and attention.rotation == "neighbors"
        and attention.temperature is None
        and norm_has_no_weight
    )


def _is_nope_attention(attention: GroupedQueryAttention.Config) -> bool:
    return _is_chunked_or_full(attention) and attention.rotation is None and attention.qk_norm is None


def _is_chunked_or_full(attention: GroupedQueryAttention.Config) -> bool:
    """Return whether the attention is chunked or full."""
    return [type(modifier) for modifier in attention.mask_modifiers] in ([], [Chunks.Config])


def _moe_fields(moe: Any) -> dict[str, Any]:
    router, experts = moe.router, moe.experts
    if not _is_supported_moe(moe):
        raise ValueError(
            f"{CANNOT_CONVERT}an MoE layer of Llama4ForCausalLM must have SwiGLUExperts with SiluGating and weighted "
            "input, a TopKRouter with score sigmoid, scale 1, no groups and no renormalize, and a shared expert of the "
            f"same width, got {moe}."
        )
    return {
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "intermediate_size": experts.hidden_dim,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    }


def _is_supported_moe(moe: MoE.Config) -> bool:
    router, experts = moe.router, moe.experts
    if not (isinstance(router, TopKRouter.Config) and isinstance(experts, SwiGLUExperts.Config)):
        return False
    is_plain = (router.score, router.groups, router.renormalize, router.scale) == ("sigmoid", None, False, 1.0)
    has_shared = moe.shared is not None and moe.shared.hidden_dim == experts.hidden_dim
    return is_plain and has_shared and moe.weighted == "input" and isinstance(experts.gating, SiluGating.Config)
