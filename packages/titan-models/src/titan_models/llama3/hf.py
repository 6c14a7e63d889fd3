"""The Hugging Face adapter of Llama 3 (`LlamaForCausalLM`)."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.hugging_face.config_reading import COMMON_DEFAULTS, head_defaults
from titan_models.hugging_face.decoder import (
    DENSE_RULES,
    GROUPED_QUERY_RULES,
    decoder_adapter,
    dense_hidden_dim,
    grouped_query_fields,
    refuse_mask_modifiers,
    refuse_uneven_heads,
)

_HF_DEFAULTS = {**COMMON_DEFAULTS, **head_defaults(32)}


def hf_adapter(config: Decoder.Config) -> HfAdapter:
    """Return the adapter of a model. Raises ValueError for a config that the transformers class does not support."""
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
    return decoder_adapter(config, hf_config, rules=GROUPED_QUERY_RULES | DENSE_RULES, hf_defaults=_HF_DEFAULTS)
