"""The Qwen3 family: the shared decoder with QK norm."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.qwen3 import hf


class Qwen3(Decoder):
    """Pre-norm blocks of grouped-query attention with `qk_norm`, and SwiGLU or a mixture of experts."""

    class Config(Decoder.Config):
        max_seq_len: int = 40_960
        """Maximum sequence length in tokens; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Return the adapter to the weights of transformers' `Qwen3ForCausalLM` or `Qwen3MoeForCausalLM`."""
            return hf.hf_adapter(self)
