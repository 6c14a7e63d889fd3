"""The GPT-OSS family: the shared decoder with sinks, windows in every second block, and biases all over."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.gpt_oss import hf
from titan_models.hugging_face.adapter import HfAdapter


class GptOss(Decoder):
    """Pre-norm blocks of grouped-query attention with sinks, and mixtures of clamped SwiGLUs; positions by YaRN."""

    class Config(Decoder.Config):
        max_seq_len: int = 131_072
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Brings the weights to and from those of transformers' `GptOssForCausalLM`."""
            return hf.hf_adapter(self)
