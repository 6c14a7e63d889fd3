"""The Llama 4 family: the shared decoder, in which every fourth block sees all of the past and nothing of positions."""

from __future__ import annotations

from titan_models.decoder import Decoder
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.llama4 import hf


class Llama4(Decoder):
    """Blocks that rotate and attend in chunks, among them some that do neither but have a temperature; experts.

    The scores of experts weigh what these get. The norm of queries and keys has no gain, and so commutes with the
    rotation: it stands before it here, and behind it in transformers.
    """

    class Config(Decoder.Config):
        max_seq_len: int = 1_048_576
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        def hf_adapter(self) -> HfAdapter:
            """Renames the weights to and from those of transformers' `Llama4ForCausalLM`."""
            return hf.hf_adapter(self)
