"""Qwen3 as transformers' `Qwen3ForCausalLM` names it."""

from __future__ import annotations

from titan_models.hf_adapter import HfAdapter
from titan_models.hf_decoder import decoder_adapter
from titan_models.qwen3.model import Qwen3

_HEAD_NORMS = {
    "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
}
_QWEN3_VOCABULARY = 151_936  # in which <|endoftext|> is 151643


def hf_adapter(config: Qwen3.Config) -> HfAdapter:
    """The adapter of a model. Raises ValueError for a model that `Qwen3ForCausalLM` cannot be."""
    known = config.vocab_size == _QWEN3_VOCABULARY
    hf_config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": False,
        "bos_token_id": 151_643 if known else None,
        "eos_token_id": 151_643 if known else None,
    }
    return decoder_adapter(config, hf_config, rules=_HEAD_NORMS)
