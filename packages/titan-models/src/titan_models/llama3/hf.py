"""Llama 3 as transformers' `LlamaForCausalLM` names it."""

from __future__ import annotations

from typing import Any

from titan_models.hf_adapter import HfAdapter
from titan_models.llama3.model import Llama3

_RULES = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
    "layers.*.feed_forward.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
}
_HEAD = {"head.weight": "lm_head.weight"}
_REPEATS = {"lm_head.weight": "model.embed_tokens.weight"}
_LLAMA3_VOCABULARY = 128_256  # in which <|begin_of_text|> is 128000 and <|end_of_text|> 128001


def hf_adapter(config: Llama3.Config) -> HfAdapter:
    """The adapter of a model. Raises ValueError for a model that `LlamaForCausalLM` cannot be."""
    tied = config.head is None
    return HfAdapter(
        config.on_meta(),
        rules=_RULES if tied else _RULES | _HEAD,
        repeats=_REPEATS if tied else {},
        config=_hf_config(config),
    )


def _hf_config(config: Llama3.Config) -> dict[str, Any]:
    blocks = config.blocks()
    num_heads = _only("num_heads", [block.attention.num_heads for block in blocks])
    num_kv_heads = _only("num_kv_heads", [block.attention.num_kv_heads for block in blocks])
    hidden_dim = _only("hidden_dim", [block.feed_forward.hidden_dim for block in blocks])
    eps = _only("eps", [config.norm.eps, *(block.norm.eps for block in blocks)])
    scaling = {"rope_type": "default"} if config.rope.scaling is None else config.rope.scaling.build().hf_parameters()
    known = config.vocab_size == _LLAMA3_VOCABULARY
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": config.rope.dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": 0.02,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_theta": config.rope.theta, **scaling},
        "tie_word_embeddings": config.head is None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": 128_000 if known else None,
        "eos_token_id": 128_001 if known else None,
        "pad_token_id": None,
    }


def _only(name: str, values: list[Any]) -> Any:
    if any(value != values[0] for value in values):
        raise ValueError(
            f"Got blocks or norms with different {name}: {values}. transformers' LlamaForCausalLM has one for all. "
            "Make them equal to export the model."
        )
    return values[0]
