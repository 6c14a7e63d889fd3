"""Llama 3 as transformers' `LlamaForCausalLM` names it."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import LEFT_OUT, heads_left_out
from titan_models.hugging_face.decoder import (
    DENSE_RULES,
    GROUPED_QUERY_RULES,
    decoder_adapter,
    dense_hidden_dim,
    grouped_query_fields,
    refuse_mask_modifiers,
    refuse_uneven_heads,
)

_LEFT_OUT = {**LEFT_OUT, **heads_left_out(32)}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """The adapter of a model. Raises ValueError for a model that `LlamaForCausalLM` cannot be."""
    refuse_mask_modifiers(config)
    heads = grouped_query_fields(config)
    refuse_uneven_heads(config, heads["num_attention_heads"])
    hf_config = {
        **heads,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": dense_hidden_dim([block.feed_forward for block in config.blocks()]),
        "mlp_bias": False,
    }
    return decoder_adapter(config, hf_config, rules=GROUPED_QUERY_RULES | DENSE_RULES, left_out=_LEFT_OUT)
