"""The Hugging Face adapter of DeepSeek (`DeepseekV2ForCausalLM`, `DeepseekV3ForCausalLM`)."""

from __future__ import annotations

from typing import Any

from titan_models.attention.base import Attention
from titan_models.attention.latent_attention import MultiHeadLatentAttention
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import COMMON_DEFAULTS, head_defaults
from titan_models.hugging_face.decoder import (
    CANNOT_CONVERT,
    DENSE_RULES,
    SPLIT_EXPERTS_RULES,
    decoder_adapter,
    dense_hidden_dim,
    refuse_mask_modifiers,
    refuse_uneven_heads,
    same_in_all,
)
from titan_models.hugging_face.rules import Rules
from titan_models.moe import ExpertGroups, MoE, SiluGating, SwiGLUExperts, TopKRouter

_ATTENTION_RULES: Rules = {
    "layers.*.attention.kv_down_proj.weight": "model.layers.*.self_attn.kv_a_proj_with_mqa.weight",
    "layers.*.attention.kv_norm.weight": "model.layers.*.self_attn.kv_a_layernorm.weight",
    "layers.*.attention.kv_proj.weight": "model.layers.*.self_attn.kv_b_proj.weight",
    "layers.*.attention.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
}
_Q_RULES: Rules = {"layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_proj.weight"}
_LOW_RANK_Q_RULES: Rules = {
    "layers.*.attention.q_down_proj.weight": "model.layers.*.self_attn.q_a_proj.weight",
    "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_a_layernorm.weight",
    "layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_b_proj.weight",
}
_SHARED_RULES: Rules = {
    "layers.*.feed_forward.shared.gate_proj.weight": "model.layers.*.mlp.shared_experts.gate_proj.weight",
    "layers.*.feed_forward.shared.up_proj.weight": "model.layers.*.mlp.shared_experts.up_proj.weight",
    "layers.*.feed_forward.shared.down_proj.weight": "model.layers.*.mlp.shared_experts.down_proj.weight",
}
_V3_RULES: Rules = {
    "layers.*.feed_forward.router.balancing.bias": "model.layers.*.mlp.gate.e_score_correction_bias",
}
_V2_DEFAULTS = {
    **{**COMMON_DEFAULTS, **head_defaults(32), "topk_method": "greedy", "n_group": None, "topk_group": None},
    **{"num_experts_per_tok": None, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
}
_V3_DEFAULTS = {
    **{**COMMON_DEFAULTS, **head_defaults(128, 128), "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_interleave": True},
}


def hf_adapter(config: Decoder.Config, *, mtp: bool) -> HfAdapter:
    """Return the adapter of a model. Raises ValueError for a config that the transformers class does not support."""
    refuse_mask_modifiers(config)
    feed_forwards = [block.feed_forward for block in config.blocks()]
    moes = [feed_forward for feed_forward in feed_forwards if isinstance(feed_forward, MoE.Config)]
    num_dense = len(feed_forwards) - len(moes)
    if not moes or any(isinstance(feed_forward, MoE.Config) for feed_forward in feed_forwards[:num_dense]):
        numbers = [number for number, feed_forward in enumerate(feed_forwards) if feed_forward in moes]
        raise ValueError(
            f"{CANNOT_CONVERT}MoE layers must be in all blocks but the first ones, and in at least one, got them in "
            f"blocks {numbers} of {len(feed_forwards)}."
        )
    attention = same_in_all("attention settings", [_attention_fields(block.attention) for block in config.blocks()])
    moe = same_in_all("MoE settings", [_moe_fields(feed_forward) for feed_forward in moes])
    hf_config = {
        **attention,
        **moe,
        "first_k_dense_replace": num_dense,
        "intermediate_size": dense_hidden_dim(feed_forwards[:num_dense]) if num_dense else moe["moe_intermediate_size"],
    }
    rules = _ATTENTION_RULES | (_Q_RULES if attention["q_lora_rank"] is None else _LOW_RANK_Q_RULES)
    rules |= SPLIT_EXPERTS_RULES | _SHARED_RULES | (DENSE_RULES if num_dense else {})
    if hf_config["model_type"] == "deepseek_v2":
        _check_v2(config, attention["num_attention_heads"], mtp)
        return decoder_adapter(config, hf_config, rules, hf_defaults=_V2_DEFAULTS)
    rules |= _V3_RULES
    if mtp:
        return _with_mtp(config, hf_config, rules)
    ignored = (f"model.layers.{config.num_layers}.",)
    return decoder_adapter(config, hf_config, rules, ignored=ignored, hf_defaults=_V3_DEFAULTS)


def _check_v2(config: Decoder.Config, num_heads: int, mtp: bool) -> None:
    refuse_uneven_heads(config, num_heads)
    if mtp:
        raise ValueError(
            f"{CANNOT_CONVERT}DeepseekV2ForCausalLM (softmax routing) has no MTP layer, got mtp=True. Set mtp=False, "
            "or use sigmoid routing (V3)."
        )


def _with_mtp(config: Decoder.Config, hf_config: dict[str, Any], rules: Rules) -> HfAdapter:
    """Return the adapter with the MTP block, stored as an additional layer that repeats embedding and head."""
    prefix, hf_prefix = f"layers.{config.num_layers}", f"model.layers.{config.num_layers}"
    names = {
        "token_norm": "enorm",
        "stream_norm": "hnorm",
        "join_proj": "eh_proj",
        "output_norm": "shared_head.norm",
    }
    return decoder_adapter(
        config,
        hf_config | {"num_nextn_predict_layers": 1},
        rules | {f"{prefix}.{name}.weight": f"{hf_prefix}.{hf_name}.weight" for name, hf_name in names.items()},
        repeats={
            f"{hf_prefix}.embed_tokens.weight": "model.embed_tokens.weight",
            f"{hf_prefix}.shared_head.head.weight": "model.embed_tokens.weight"
            if config.head is None
            else "lm_head.weight",
        },
        final_norm=f"{prefix}.final_norm",
        hf_defaults=_V3_DEFAULTS,
    )


def _attention_fields(attention: Attention.Config) -> dict[str, Any]:
    if not isinstance(attention, MultiHeadLatentAttention.Config):
        raise ValueError(
            f"{CANNOT_CONVERT}attention must be MultiHeadLatentAttention, got {type(attention).__qualname__}."
        )
    if attention.latent_norm.eps != 1e-6:
        raise ValueError(
            f"{CANNOT_CONVERT}latent_norm.eps must be 1e-6, whatever the eps of other norms, got "
            f"{attention.latent_norm.eps}."
        )
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.head_dim,
        "qk_rope_head_dim": attention.rotated_head_dim,
        "v_head_dim": attention.value_head_dim,
        "rope_interleave": True,
    }


def _moe_fields(moe: Any) -> dict[str, Any]:
    router, experts, shared = moe.router, moe.experts, moe.shared
    if shared is None or not _is_supported(moe):
        raise ValueError(
            f"{CANNOT_CONVERT}an MoE layer must have SwiGLUExperts with SiluGating and weighted output, a TopKRouter, "
            f"and shared experts whose width is a multiple of that of an expert, got {moe}."
        )
    fields = _v2_fields(router) if router.score == "softmax" else _v3_fields(router)
    return {
        **fields,
        "n_routed_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "n_shared_experts": shared.hidden_dim // experts.hidden_dim,
        "moe_intermediate_size": experts.hidden_dim,
        "moe_layer_freq": 1,
        "routed_scaling_factor": router.scale,
        "scoring_func": router.score,
        "output_router_logits": False,
    }


def _is_supported(moe: MoE.Config) -> bool:
    router, experts = moe.router, moe.experts
    if not (isinstance(router, TopKRouter.Config) and isinstance(experts, SwiGLUExperts.Config)):
        return False
    is_gated = moe.weighted == "output" and isinstance(experts.gating, SiluGating.Config)
    return is_gated and moe.shared is not None and moe.shared.hidden_dim % experts.hidden_dim == 0


def _v2_fields(router: TopKRouter.Config) -> dict[str, Any]:
    groups = router.groups
    if router.renormalize or router.balancing is not None or (groups is not None and groups.score != "best"):
        raise ValueError(
            f"{CANNOT_CONVERT}a router of DeepseekV2ForCausalLM (softmax routing) must have no renormalize, no "
            f"balancing bias, and no groups or groups with score 'best', got {router}."
        )
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "greedy" if groups is None else "group_limited_greedy",
        "n_group": None if groups is None else groups.num_groups,
        "topk_group": None if groups is None else groups.num_kept,
        "norm_topk_prob": False,
        "mlp_bias": False,
    }


def _v3_fields(router: TopKRouter.Config) -> dict[str, Any]:
    groups = router.groups or ExpertGroups.Config(num_groups=1, num_kept=1, score="sum of best two")
    if router.balancing is None or groups.score != "sum of best two":
        raise ValueError(
            f"{CANNOT_CONVERT}a router of DeepseekV3ForCausalLM (sigmoid routing) must have a balancing bias, and no "
            f"groups or groups with score 'sum of best two', got {router}."
        )
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "n_group": groups.num_groups,
        "topk_group": groups.num_kept,
        "norm_topk_prob": router.renormalize,
        "num_nextn_predict_layers": 0,
    }
