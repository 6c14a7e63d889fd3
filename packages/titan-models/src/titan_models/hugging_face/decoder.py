"""The adapter of decoders in the Hugging Face layout of Llama, which most families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_config import traverse

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter, NestedCheckpoint
from titan_models.hugging_face.config_reading import HfDefaults
from titan_models.hugging_face.rules import Rules
from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.swiglu import SwiGLU

_RULES: Rules = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
}
GROUPED_QUERY_RULES: Rules = {
    "layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
}
"""Rules for the `GroupedQueryAttention` of a block."""

DENSE_RULES: Rules = {
    "layers.*.feed_forward.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
    "layers.*.feed_forward.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
}
"""Rules for the `SwiGLU` of a block."""

SPLIT_EXPERTS_RULES: Rules = {
    "layers.*.feed_forward.router.weight": "model.layers.*.mlp.gate.weight",
    "layers.*.feed_forward.experts.gate_proj.weight": "model.layers.*.mlp.experts.#.gate_proj.weight",
    "layers.*.feed_forward.experts.up_proj.weight": "model.layers.*.mlp.experts.#.up_proj.weight",
    "layers.*.feed_forward.experts.down_proj.weight": "model.layers.*.mlp.experts.#.down_proj.weight",
}
"""Rules for a router and `SwiGLUExperts` of which each matrix is a separate tensor."""

CANNOT_CONVERT = "Cannot convert to Hugging Face format: "
"""The beginning of errors about models that the family in transformers does not support."""

_HEAD: Rules = {"head.weight": "lm_head.weight"}
_REPEATS = {"lm_head.weight": "model.embed_tokens.weight"}


def decoder_adapter(
    config: Decoder.Config,
    hf_config: Mapping[str, Any],
    rules: Rules,
    ignored: tuple[str, ...] = (),
    repeats: Mapping[str, str] | None = None,
    final_norm: str = "norm",
    nested: NestedCheckpoint | None = None,
    hf_defaults: HfDefaults | None = None,
) -> HfAdapter:
    """Return the adapter of a decoder; `hf_config` and `rules` add those of the family to the common ones.

    `ignored`, `repeats`, `nested` and `hf_defaults` are those of `HfAdapter`; `final_norm` is the name of the norm
    before the head. Raises ValueError for a setting of `config` that the family in transformers does not support.
    """
    tied = config.head is None
    return HfAdapter(
        config.on_meta(),
        rules={**_RULES, f"{final_norm}.weight": "model.norm.weight", **({} if tied else _HEAD), **rules},
        repeats={**(_REPEATS if tied else {}), **(repeats or {})},
        config={**_hf_config(config), **hf_config},
        ignored=ignored,
        nested=nested,
        hf_defaults=hf_defaults,
    )


def same_in_all(name: str, values: list[Any]) -> Any:
    """Return the value that all blocks or norms have in common. Raises ValueError if they differ."""
    if any(value != values[0] for value in values):
        raise ValueError(f"{CANNOT_CONVERT}all blocks or norms must have the same {name}, got {values}.")
    return values[0]


def dense_hidden_dim(feed_forwards: list[FeedForward.Config]) -> int:
    """Return the width of all these layers. Raises ValueError unless each is a `SwiGLU` of the same width."""
    hidden_dims = []
    for feed_forward in feed_forwards:
        if not isinstance(feed_forward, SwiGLU.Config):
            raise ValueError(
                f"{CANNOT_CONVERT}the feed-forward layer must be a SwiGLU, got {type(feed_forward).__qualname__}."
            )
        hidden_dims.append(feed_forward.hidden_dim)
    return same_in_all("hidden_dim", hidden_dims)


def grouped_query_fields(config: Decoder.Config) -> dict[str, Any]:
    """Return the `config.json` settings of grouped-query attention, except those of mask modifiers.

    Raises ValueError unless all blocks have equal `GroupedQueryAttention` without extensions.
    """
    for attention in grouped_queries(config):
        without_weight = attention.qk_norm is not None and attention.qk_norm.weight_init is None
        if attention.rotation != "halves" or attention.temperature is not None or without_weight:
            raise ValueError(
                f"{CANNOT_CONVERT}attention must have rotation 'halves', no temperature, and no qk_norm without a "
                f"weight, got rotation {attention.rotation!r}, temperature {attention.temperature} and qk_norm "
                f"{attention.qk_norm}."
            )
    return head_fields(config)


def head_fields(config: Decoder.Config) -> dict[str, Any]:
    """Return the `config.json` settings of heads. Raises ValueError unless they are the same in all blocks."""
    fields = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
    }
    return {
        hf_name: same_in_all(name, [getattr(attention, name) for attention in grouped_queries(config)])
        for hf_name, name in fields.items()
    }


def grouped_queries(config: Decoder.Config) -> list[GroupedQueryAttention.Config]:
    """Return the attention config of each block. Raises ValueError unless all are `GroupedQueryAttention`."""
    attentions = []
    for block in config.blocks():
        if not isinstance(block.attention, GroupedQueryAttention.Config):
            raise ValueError(
                f"{CANNOT_CONVERT}attention must be GroupedQueryAttention, got {type(block.attention).__qualname__}."
            )
        attentions.append(block.attention)
    return attentions


def refuse_mask_modifiers(config: Decoder.Config) -> None:
    """Raise ValueError for a model with mask modifiers."""
    if any(block.attention.mask_modifiers for block in config.blocks()):
        raise ValueError(
            f"{CANNOT_CONVERT}attention must have no mask_modifiers, since this family in transformers has full causal "
            "attention, got some."
        )


def refuse_uneven_heads(config: Decoder.Config, num_heads: int) -> None:
    """Raise ValueError for a width that is no multiple of the number of heads, which the transformers class rejects."""
    if config.dim % num_heads:
        raise ValueError(
            f"{CANNOT_CONVERT}dim must be a multiple of the number of heads ({num_heads}), whatever head_dim, got "
            f"{config.dim}."
        )


def _refuse_norms_without_weight(config: Decoder.Config) -> None:
    if None in [norm.weight_init for norm in (config.norm, *(block.norm for block in config.blocks()))]:
        raise ValueError(
            f"{CANNOT_CONVERT}the norms of blocks and before the head must have a weight, got weight_init None."
        )


def _hf_config(config: Decoder.Config) -> dict[str, Any]:
    _refuse_norms_without_weight(config)
    norms = [
        norm
        for path, norm in traverse(config)
        if isinstance(norm, RMSNorm.Config) and not path.endswith("latent_norm")  # which config.json does not have
    ]
    scaling = {"rope_type": "default"} if config.rope.scaling is None else config.rope.scaling.build().hf_parameters()
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": 0.02,
        "rms_norm_eps": same_in_all("eps", [norm.eps for norm in norms]),
        "rope_parameters": {"rope_theta": config.rope.theta, **scaling},
        "tie_word_embeddings": config.head is None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,  # of the tokenizer; the exporter sets them
        "eos_token_id": None,
        "pad_token_id": None,
    }
