"""The DeepSeek family: the shared decoder with latent attention, and experts in all blocks but the first."""

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
    """Pre-norm blocks of `MultiHeadLatentAttention`, and SwiGLU or a mixture of experts with shared ones.

    With `mtp` the last of `layers` is a `MultiTokenPredictionBlock`, and the model may be given the tokens that follow.
    """

    class Config(Decoder.Config):
        max_seq_len: int = 163_840
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        mtp: bool = False
        """One block more, alike, predicts the token after next in training: V3's multi-token prediction, of depth 1."""

        def hf_adapter(self) -> HfAdapter:
            """Renames the weights to and from those of `DeepseekV2ForCausalLM` or `DeepseekV3ForCausalLM`."""
            return hf.hf_adapter(self, mtp=self.mtp)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.has_mtp = config.mtp
        if config.mtp:
            block = config.block
            one_more = MultiTokenPredictionBlock.Config(
                attention=block.attention, feed_forward=block.feed_forward, norm=block.norm
            )
            sizes = {"dim": config.dim, "vocab_size": config.vocab_size}
            self.layers.append(one_more.build(final_norm=config.norm, **sizes))
            self.norm: nn.Module = nn.Identity()  # the last block has it
            self.next_embedding: TiedEmbedding = TiedEmbedding.Config().build(embedding=self.embedding)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        next_tokens: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder`; with `next_tokens [B, T]`, the token that follows each, two logits of each: `[B, 2, T, V]`.

        The first are of the next token, the second of the one after it. Where nothing follows, any token will do.
        """
        if next_tokens is None:
            return super().forward(tokens, positions, document_ids)
        if not self.has_mtp:
            raise ValueError(
                "Got next_tokens for a model that does not look ahead. Its blocks know what they predict from. Set "
                "mtp on the model, or take it from the loader."
            )
        x_BTD, places, masks = self.enter(tokens, positions, document_ids)
        *stack, last = (cast(Block, layer) for layer in self.layers)
        for layer in stack:
            x_BTD = layer(x_BTD, places, masks.of(layer.attention))
        return self.head(last(x_BTD, places, masks.of(last.attention), self.next_embedding(next_tokens)))

    def roles(self) -> Roles:
        if not self.has_mtp:
            return super().roles()
        roles: Roles = {"embedding": "embedding", "head": "head"}
        for number, layer in enumerate(self.layers):
            roles |= under(f"layers.{number}", cast(Block, layer).roles())
        return roles | {"next_embedding": ("embedding", {"between_blocks": True})}
