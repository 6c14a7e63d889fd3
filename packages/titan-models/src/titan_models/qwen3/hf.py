"""The Hugging Face adapter of Qwen3 (`Qwen3ForCausalLM`, `Qwen3MoeForCausalLM`)."""

from __future__ import annotations

from typing import Any

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import COMMON_DEFAULTS, Settings, count_in, head_defaults
from titan_models.hugging_face.decoder import (
    CANNOT_CONVERT,
    DENSE_RULES,
    GROUPED_QUERY_RULES,
    SPLIT_EXPERTS_RULES,
    decoder_adapter,
    dense_hidden_dim,
    grouped_query_fields,
    refuse_mask_modifiers,
    same_in_all,
)
from titan_models.hugging_face.rules import Rules
from titan_models.moe import MoE, SiluGating, SwiGLUExperts, TopKRouter

_HEAD_NORMS: Rules = {
    "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
}
_HF_DEFAULTS = {**COMMON_DEFAULTS, **head_defaults(32, 32, 128), "use_sliding_window": False}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """Return the adapter of a model. Raises ValueError for a config that the transformers class does not support."""
    refuse_mask_modifiers(config)
    feed_forwards = {layer: block.feed_forward for layer, block in enumerate(config.blocks())}
    moes = {
        layer: feed_forward for layer, feed_forward in feed_forwards.items() if isinstance(feed_forward, MoE.Config)
    }
    dense = {layer: feed_forward for layer, feed_forward in feed_forwards.items() if layer not in moes}
    hf_config: dict[str, Any] = {
        **grouped_query_fields(config),
        "use_sliding_window": False,
    }
    if not moes:
        hf_config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    else:
        hf_config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [*dense]}
        hf_config |= same_in_all("MoE settings", [_moe_fields(moe) for moe in moes.values()])
    if dense:
        hf_config["intermediate_size"] = dense_hidden_dim([*dense.values()])
    rules = GROUPED_QUERY_RULES | _HEAD_NORMS | (SPLIT_EXPERTS_RULES if moes else {}) | (DENSE_RULES if dense else {})
    return decoder_adapter(config, hf_config, rules, hf_defaults=_MOE_DEFAULTS if moes else _HF_DEFAULTS)


def _dense_layers(config: Settings) -> list[int]:
    """Return the layers without experts: those listed, and all but every `decoder_sparse_step`-th."""
    listed, step = config.get("mlp_only_layers") or (), count_in(config, "decoder_sparse_step", 1)
    return [layer for layer in range(count_in(config, "num_hidden_layers")) if layer in listed or (layer + 1) % step]


_MOE_DEFAULTS = {
    **{**COMMON_DEFAULTS, **head_defaults(32, 4), "use_sliding_window": False},
    **{"num_experts_per_tok": 8, "norm_topk_prob": False, "mlp_only_layers": _dense_layers},
    "decoder_sparse_step": lambda _: 1,  # included in the list
}


def _moe_fields(moe: Any) -> dict[str, Any]:
    router, experts = moe.router, moe.experts
    if not _is_supported(moe):
        raise ValueError(
            f"{CANNOT_CONVERT}an MoE layer of Qwen3MoeForCausalLM must have SwiGLUExperts with SiluGating and weighted "
            "output, a TopKRouter with score softmax, scale 1, no groups and no balancing bias, and no shared experts, "
            f"got {moe}."
        )
    return {
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.renormalize,
        "moe_intermediate_size": experts.hidden_dim,
        "intermediate_size": experts.hidden_dim * router.top_k,  # overwritten if there are dense layers
        "decoder_sparse_step": 1,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }


def _is_supported(moe: MoE.Config) -> bool:
    router = moe.router
    if not (isinstance(router, TopKRouter.Config) and isinstance(moe.experts, SwiGLUExperts.Config)):
        return False
    is_plain = router.groups is None and router.balancing is None and (router.score, router.scale) == ("softmax", 1.0)
    is_gated = moe.weighted == "output" and isinstance(moe.experts.gating, SiluGating.Config)
    return is_plain and is_gated and moe.shared is None
