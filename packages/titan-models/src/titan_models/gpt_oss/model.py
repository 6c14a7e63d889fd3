"""The GPT-OSS family: the shared decoder with attention sinks, biases, and sliding windows in every second block."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.gpt_oss import hf
from titan_models.hugging_face.adapter import HfAdapter


class GptOss(Decoder):
    """Pre-norm blocks of grouped-query attention with sinks and MoE layers of clamped SwiGLU experts; YaRN RoPE."""

    class Config(Decoder.Config):
        max_seq_len: int = 131_072
        """Maximum sequence length in tokens; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Return the adapter to the weights of transformers' `GptOssForCausalLM`."""
            return hf.hf_adapter(self)
