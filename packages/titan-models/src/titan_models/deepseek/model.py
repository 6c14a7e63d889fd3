"""The DeepSeek family: the shared decoder with latent attention (MLA), and MoE layers in all but the first blocks."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from titan_models.block import Block
from titan_models.decoder import Decoder
from titan_models.deepseek import hf
from titan_models.deepseek.mtp import MultiTokenPredictionBlock
from titan_models.hugging_face.adapter import HfAdapter
from titan_models.layers.roles import Roles, under
from titan_models.layers.tied import TiedEmbedding


class DeepSeek(Decoder):
    """Pre-norm blocks of `MultiHeadLatentAttention` with SwiGLU or with an MoE layer that has shared experts.

    With `mtp` the last of `layers` is a `MultiTokenPredictionBlock`, and the forward accepts `next_tokens`.
    """

    class Config(Decoder.Config):
        max_seq_len: int = 163_840
        """Maximum sequence length in tokens; exported as max_position_embeddings."""

        mtp: bool = False
        """Multi-token prediction (MTP) of depth 1, as in V3: one more block, which predicts the token after next."""

        def hf_adapter(self) -> HfAdapter:
            """Return the adapter to the weights of transformers' `DeepseekV2ForCausalLM` or `DeepseekV3ForCausalLM`."""
            return hf.hf_adapter(self, mtp=self.mtp)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.has_mtp = config.mtp
        if config.mtp:
            block = config.block
            mtp_block = MultiTokenPredictionBlock.Config(
                attention=block.attention, feed_forward=block.feed_forward, norm=block.norm
            )
            sizes = {"dim": config.dim, "vocab_size": config.vocab_size}
            self.layers.append(mtp_block.build(final_norm=config.norm, **sizes))
            self.norm: nn.Module = nn.Identity()  # the MTP block applies it
            self.next_embedding: TiedEmbedding = TiedEmbedding.Config().build(embedding=self.embedding)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        next_tokens: Tensor | None = None,
    ) -> Tensor:
        """Return logits as `Decoder.forward` does, or `[B, 2, T, V]` with `next_tokens [B, T]`.

        `next_tokens` is the token after each of `tokens`; at the end of a document any token id is valid. The first
        logits predict the next token, the second ones the token after next.
        """
        if next_tokens is None:
            return super().forward(tokens, positions, document_ids)
        if not self.has_mtp:
            raise ValueError(
                "next_tokens must be None for a model without multi-token prediction (MTP), got a tensor. Set mtp=True "
                "in the config of the model, or turn next tokens off in the data loader."
            )
        x_BTD, rotary, masks = self.enter(tokens, positions, document_ids)
        *stack, last = (cast(Block, layer) for layer in self.layers)
        for layer in stack:
            x_BTD = layer(x_BTD, rotary, masks.get(layer.attention))
        return self.head(last(x_BTD, rotary, masks.get(last.attention), self.next_embedding(next_tokens)))

    def roles(self) -> Roles:
        if not self.has_mtp:
            return super().roles()
        roles: Roles = {"embedding": "embedding", "head": "head"}
        for number, layer in enumerate(self.layers):
            roles |= under(f"layers.{number}", cast(Block, layer).roles())
        return roles | {"next_embedding": ("embedding", {"between_blocks": True})}
