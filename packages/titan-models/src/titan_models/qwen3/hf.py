"""Qwen3 as transformers' `Qwen3ForCausalLM` and `Qwen3MoeForCausalLM` name it."""

from __future__ import annotations

from typing import Any

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import LEFT_OUT, Settings, count_in, heads_left_out
from titan_models.hugging_face.decoder import (
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
_LEFT_OUT = {**LEFT_OUT, **heads_left_out(32, 32, 128), "use_sliding_window": False}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """The adapter of a model. Raises ValueError for a model that transformers' classes cannot be."""
    refuse_mask_modifiers(config)
    feed_forwards = {layer: block.feed_forward for layer, block in enumerate(config.blocks())}
    moes = {layer: part for layer, part in feed_forwards.items() if isinstance(part, MoE.Config)}
    dense = {layer: part for layer, part in feed_forwards.items() if layer not in moes}
    hf_config: dict[str, Any] = {
        **grouped_query_fields(config),
        "use_sliding_window": False,
    }
    if not moes:
        hf_config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    else:
        hf_config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [*dense]}
        hf_config |= same_in_all("mixtures of experts", [_moe_fields(moe) for moe in moes.values()])
    if dense:
        hf_config["intermediate_size"] = dense_hidden_dim([*dense.values()])
    rules = GROUPED_QUERY_RULES | _HEAD_NORMS | (SPLIT_EXPERTS_RULES if moes else {}) | (DENSE_RULES if dense else {})
    return decoder_adapter(config, hf_config, rules, left_out=_MOE_LEFT_OUT if moes else _LEFT_OUT)


def _dense_layers(config: Settings) -> list[int]:
    """Those listed, and all but every `decoder_sparse_step`-th."""
    listed, step = config.get("mlp_only_layers") or (), count_in(config, "decoder_sparse_step", 1)
    return [layer for layer in range(count_in(config, "num_hidden_layers")) if layer in listed or (layer + 1) % step]


_MOE_LEFT_OUT = {
    **{**LEFT_OUT, **heads_left_out(32, 4), "use_sliding_window": False},
    **{"num_experts_per_tok": 8, "norm_topk_prob": False, "mlp_only_layers": _dense_layers},
    "decoder_sparse_step": lambda _: 1,  # the list then says it all
}


def _moe_fields(moe: Any) -> dict[str, Any]:
    router, experts = moe.router, moe.experts
    if not _is_qwens(moe):
        raise ValueError(
            f"Got {moe}. transformers' Qwen3MoeForCausalLM has SwiGLUExperts, chosen by a TopKRouter by their softmax "
            "alone, and no shared ones. Make it that to export the model."
        )
    return {
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.renormalize,
        "moe_intermediate_size": experts.hidden_dim,
        "intermediate_size": experts.hidden_dim * router.top_k,  # of dense layers, if there are any
        "decoder_sparse_step": 1,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }


def _is_qwens(moe: MoE.Config) -> bool:
    router = moe.router
    if not (isinstance(router, TopKRouter.Config) and isinstance(moe.experts, SwiGLUExperts.Config)):
        return False
    plain = router.groups is None and router.balancing is None and (router.score, router.scale) == ("softmax", 1.0)
    gated = moe.weighted == "output" and isinstance(moe.experts.gating, SiluGating.Config)
    return plain and gated and moe.shared is None
