"""Llama 4 as transformers' `Llama4ForCausalLM` names it, and as the released files of text and images hold it."""

from __future__ import annotations

from typing import Any

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.mask import Chunks
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter, NestedCheckpoint
from titan_models.hugging_face.config_reading import LEFT_OUT, Settings, count_in, heads_left_out
from titan_models.hugging_face.decoder import (
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
    """The adapter of a model. Raises ValueError for a model that `Llama4ForCausalLM` cannot be."""
    feed_forwards = {layer: block.feed_forward for layer, block in enumerate(config.blocks())}
    moes = {layer: part for layer, part in feed_forwards.items() if isinstance(part, MoE.Config)}
    dense = [part for layer, part in feed_forwards.items() if layer not in moes]
    hf_config: dict[str, Any] = {
        **_attention_fields(config),
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "moe_layers": [*moes],
    }
    if moes:
        hf_config |= same_in_all("mixtures of experts", [_moe_fields(moe) for moe in moes.values()])
    if dense:
        hf_config["intermediate_size_mlp"] = dense_hidden_dim(dense)
    rules = GROUPED_QUERY_RULES | (_MOE_RULES if moes else {}) | (_DENSE_RULES if dense else {})
    inside = NestedCheckpoint("language_model.", others=("vision_model.", "multi_modal_projector."))
    return decoder_adapter(config, hf_config, rules, nested=inside, left_out=_LEFT_OUT)


def _moe_layers(config: Settings) -> Any:
    step, stated = count_in(config, "interleave_moe_layer_step", 1), config.get("moe_layers")
    return [*range(step - 1, count_in(config, "num_hidden_layers"), step)] if stated is None else stated


def _rotating_layers(config: Settings) -> Any:
    interval, layers = count_in(config, "no_rope_layer_interval", 4), range(count_in(config, "num_hidden_layers"))
    return config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]


def _kinds_of_layers(config: Settings) -> Any:
    kinds = ["chunked_attention" if rotates else "full_attention" for rotates in config["no_rope_layers"]]
    return kinds if config.get("layer_types") is None else config["layer_types"]


_LEFT_OUT = {
    **{**LEFT_OUT, **heads_left_out(40, 8, 128), "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    **{"moe_layers": _moe_layers, "no_rope_layers": _rotating_layers, "layer_types": _kinds_of_layers},
    **{"num_experts_per_tok": 1, "attention_chunk_size": 8192, "use_qk_norm": True},
    **{"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1},
}


def _attention_fields(config: Decoder.Config) -> dict[str, Any]:
    attentions = grouped_queries(config)
    for attention in attentions:
        if not (_is_llamas_rotating(attention) or _is_llamas_still(attention)):
            raise ValueError(
                f"Got {attention}. In transformers' Llama4ForCausalLM attention rotates neighbors, with a norm "
                "without a gain or with none, or it does not rotate and may have a temperature; it sees all of the "
                "past or its chunk. Make it one of these to export the model."
            )
    scaling = config.rope.scaling
    if any(each.qk_norm for each in attentions) and scaling is not None and scaling.build().attention_factor() != 1.0:
        raise ValueError(
            f"Got qk_norm with a rope whose features are multiplied by {scaling.build().attention_factor()}. "
            "transformers' Llama4ForCausalLM norms them after that. Do without one of both to export the model."
        )
    rotating = [attention for attention in attentions if attention.rotation is not None]
    still = [attention for attention in attentions if attention.rotation is None]
    fields = {
        **head_fields(config),
        "no_rope_layers": [int(attention.rotation is not None) for attention in attentions],
        "layer_types": [
            "chunked_attention" if attention.mask_modifiers else "full_attention" for attention in attentions
        ],
        "use_qk_norm": bool(rotating) and same_in_all("qk_norm", [each.qk_norm for each in rotating]) is not None,
    }
    if chunks := [limit for attention in attentions for limit in attention.mask_modifiers]:
        fields["attention_chunk_size"] = same_in_all("chunks", chunks).size
    temperature = same_in_all("temperature", [each.temperature for each in still]) if still else None
    fields["attn_temperature_tuning"] = temperature is not None
    if temperature is not None:
        fields |= {"floor_scale": temperature.step, "attn_scale": temperature.strength}
    return fields


def _is_llamas_rotating(attention: GroupedQueryAttention.Config) -> bool:
    norm = attention.qk_norm
    normed_plainly = norm is None or norm.weight_init is None
    return (
        _sees_chunks(attention)
        and attention.rotation == "neighbors"
        and attention.temperature is None
        and normed_plainly
    )


def _is_llamas_still(attention: GroupedQueryAttention.Config) -> bool:
    return _sees_chunks(attention) and attention.rotation is None and attention.qk_norm is None


def _sees_chunks(attention: GroupedQueryAttention.Config) -> bool:
    """Or everything."""
    return [type(limit) for limit in attention.mask_modifiers] in ([], [Chunks.Config])


def _moe_fields(moe: Any) -> dict[str, Any]:
    router, experts = moe.router, moe.experts
    if not _is_llamas_moe(moe):
        raise ValueError(
            f"Got {moe}. transformers' Llama4ForCausalLM has SwiGLUExperts and a shared one of the same width, chosen "
            "by a TopKRouter by their sigmoid alone, which weighs their input. Make it that to export the model."
        )
    return {
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "intermediate_size": experts.hidden_dim,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    }


def _is_llamas_moe(moe: MoE.Config) -> bool:
    router, experts = moe.router, moe.experts
    if not (isinstance(router, TopKRouter.Config) and isinstance(experts, SwiGLUExperts.Config)):
        return False
    plain = (router.score, router.groups, router.renormalize, router.scale) == ("sigmoid", None, False, 1.0)
    shared = moe.shared is not None and moe.shared.hidden_dim == experts.hidden_dim
    return plain and shared and moe.weighted == "input" and isinstance(experts.gating, SiluGating.Config)
