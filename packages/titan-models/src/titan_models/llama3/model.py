"""The Llama 3 family: the shared decoder without changes."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.llama3 import hf


class Llama3(Decoder):
    """Pre-norm blocks of grouped-query attention and SwiGLU, with rotary positions scaled for long sequences."""

    class Config(Decoder.Config):
        max_seq_len: int = 131_072
        """Maximum sequence length in tokens; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Return the adapter to the weights of transformers' `LlamaForCausalLM`."""
            return hf.hf_adapter(self)
