"""The Llama 4 family: the shared decoder with chunked attention, and full attention without RoPE in every 4th block."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.llama4 import hf


class Llama4(Decoder):
    """Blocks with RoPE and chunked attention, some NoPE blocks with full attention and a temperature, and MoE layers.

    The routing weights multiply the inputs of the experts. The QK norm has no weight and therefore commutes with the
    rotation: it is applied before the rotation here, and after it in transformers.
    """

    class Config(Decoder.Config):
        max_seq_len: int = 1_048_576
        """Maximum sequence length in tokens; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Return the adapter to the weights of transformers' `Llama4ForCausalLM`."""
            return hf.hf_adapter(self)
