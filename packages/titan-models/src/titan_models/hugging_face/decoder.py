"""The decoder in the layout that Hugging Face gave to Llama, and to the many models that follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_config import traverse

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter, NestedCheckpoint
from titan_models.hugging_face.config_reading import LeftOut
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
"""Names of the `GroupedQueryAttention` of a block."""

DENSE_RULES: Rules = {
    "layers.*.feed_forward.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
    "layers.*.feed_forward.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
}
"""Names of the SwiGLU of a block, if a block has one."""

SPLIT_EXPERTS_RULES: Rules = {
    "layers.*.feed_forward.router.weight": "model.layers.*.mlp.gate.weight",
    "layers.*.feed_forward.experts.gate_proj.weight": "model.layers.*.mlp.experts.#.gate_proj.weight",
    "layers.*.feed_forward.experts.up_proj.weight": "model.layers.*.mlp.experts.#.up_proj.weight",
    "layers.*.feed_forward.experts.down_proj.weight": "model.layers.*.mlp.experts.#.down_proj.weight",
}
"""Names of a router and SwiGLU experts, of which each matrix is a tensor of its own."""

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
    left_out: LeftOut | None = None,
) -> HfAdapter:
    """The adapter of a decoder: `hf_config` and `rules` are what its family has besides what all have.

    `ignored`, `repeats`, `nested` and `left_out` are those of `HfAdapter`; `final_norm` is the name of the norm before
    the head.

    Raises ValueError, naming it, for what `config` has and the family in transformers cannot have.
    """
    tied = config.head is None
    return HfAdapter(
        config.on_meta(),
        rules={**_RULES, f"{final_norm}.weight": "model.norm.weight", **({} if tied else _HEAD), **rules},
        repeats={**(_REPEATS if tied else {}), **(repeats or {})},
        config={**_hf_config(config), **hf_config},
        ignored=ignored,
        nested=nested,
        left_out=left_out,
    )


def same_in_all(name: str, values: list[Any]) -> Any:
    """The one value that all blocks or norms have. Raises ValueError where they differ."""
    if any(value != values[0] for value in values):
        raise ValueError(
            f"Got blocks or norms with different {name}: {values}. The family in transformers has one for all. "
            "Make them equal to export the model."
        )
    return values[0]


def dense_hidden_dim(feed_forwards: list[FeedForward.Config]) -> int:
    """The width of all these layers. Raises ValueError unless each is a SwiGLU, and they are alike."""
    hidden_dims = []
    for feed_forward in feed_forwards:
        if not isinstance(feed_forward, SwiGLU.Config):
            raise ValueError(
                f"Got a block with a {type(feed_forward).__qualname__}. The family in transformers has SwiGLU there. "
                "Make it one to export the model."
            )
        hidden_dims.append(feed_forward.hidden_dim)
    return same_in_all("hidden_dim", hidden_dims)


def grouped_query_fields(config: Decoder.Config) -> dict[str, Any]:
    """What a `config.json` says of grouped queries. Raises ValueError unless all blocks have them, plain and alike.

    It says nothing of mask_modifiers: a family that has some in transformers says which.
    """
    for attention in grouped_queries(config):
        gainless = attention.qk_norm is not None and attention.qk_norm.weight_init is None
        if attention.rotation != "halves" or attention.temperature is not None or gainless:
            raise ValueError(
                f"Got attention with rotation {attention.rotation!r}, temperature {attention.temperature} and qk_norm "
                f"{attention.qk_norm}. The family in transformers rotates halves, has no temperature, and no norm "
                "without a gain. Make it so to export the model."
            )
    return head_fields(config)


def head_fields(config: Decoder.Config) -> dict[str, Any]:
    """What a `config.json` says of heads. Raises ValueError unless all blocks have grouped queries, as many each."""
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
    """The attention of each block. Raises ValueError unless it is that."""
    attentions = []
    for block in config.blocks():
        if not isinstance(block.attention, GroupedQueryAttention.Config):
            raise ValueError(
                f"Got a block with a {type(block.attention).__qualname__}. The family in transformers has "
                "GroupedQueryAttention there. Make it one to export the model."
            )
        attentions.append(block.attention)
    return attentions


def refuse_mask_modifiers(config: Decoder.Config) -> None:
    """Raise ValueError for a model whose queries do not see all of their past."""
    if any(block.attention.mask_modifiers for block in config.blocks()):
        raise ValueError(
            "Got attention with mask_modifiers. In the family in transformers every query sees all of its document's past. "
            "Remove them to export the model."
        )


def refuse_uneven_heads(config: Decoder.Config, num_heads: int) -> None:
    """Raise ValueError for a width that transformers' class refuses, though it has a head_dim of its own."""
    if config.dim % num_heads:
        raise ValueError(
            f"Got dim {config.dim} with {num_heads} heads. The family in transformers has a width that is a multiple "
            "of their number, whatever their own. Make it one to export the model."
        )


def _refuse_plain_norms(config: Decoder.Config) -> None:
    if None in [norm.weight_init for norm in (config.norm, *(block.norm for block in config.blocks()))]:
        raise ValueError(
            "Got a norm without a gain, of a block or before the head. The family in transformers has gains there. "
            "Give it a weight_init to export the model."
        )


def _hf_config(config: Decoder.Config) -> dict[str, Any]:
    _refuse_plain_norms(config)
    norms = [
        part
        for path, part in traverse(config)
        if isinstance(part, RMSNorm.Config) and not path.endswith("latent_norm")  # of which config.json says nothing
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
        "bos_token_id": None,  # of a tokenizer, which a model does not know; what exports it says which
        "eos_token_id": None,
        "pad_token_id": None,
    }
