"""The DeepSeek family: the shared decoder with latent attention, and experts in all blocks but the first."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hf_adapter import HfAdapter


class DeepSeek(Decoder):
    """Pre-norm blocks of `MultiHeadLatentAttention`, and SwiGLU or a mixture of experts with shared ones."""

    class Config(Decoder.Config):
        max_seq_len: int = 163_840
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Renames the weights to and from those of `DeepseekV2ForCausalLM` or `DeepseekV3ForCausalLM`."""
            from titan_models.deepseek.hf import hf_adapter

            return hf_adapter(self)
