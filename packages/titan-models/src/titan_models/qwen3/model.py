"""The Qwen3 family: the shared decoder with queries and keys normalized head by head."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.qwen3 import hf


class Qwen3(Decoder):
    """Pre-norm blocks of grouped-query attention with `qk_norm`, and SwiGLU or a mixture of experts."""

    class Config(Decoder.Config):
        max_seq_len: int = 40_960
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Renames the weights to and from those of transformers' `Qwen3ForCausalLM` or `Qwen3MoeForCausalLM`."""
            return hf.hf_adapter(self)
