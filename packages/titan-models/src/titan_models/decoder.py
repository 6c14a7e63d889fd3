"""The decoder that language model families are configs of: an embedding, a stack of blocks, a norm and a head."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from titan_models.block import Block
from titan_models.embedding import Embedding
from titan_models.linear import Linear
from titan_models.mask import Mask
from titan_models.model import Model
from titan_models.rms_norm import RMSNorm
from titan_models.roles import Roles, under
from titan_models.rope import Rope
from titan_models.tied_linear import TiedLinear


class Decoder(Model):
    """Token ids to logits. B batch, T tokens, D width, V vocabulary.

    A family derives from it, states in its config how long its sequences are, and adds its Hugging Face adapter.
    """

    class Config(Model.Config):
        dim: int
        """Width of the stream."""

        num_layers: int
        """Blocks."""

        block: Block.Config
        """Every block."""

        exceptions: dict[int, Block.Config] = {}
        """Blocks that are different, by their number."""

        rope: Rope.Config
        """Rotary positions of queries and keys."""

        embedding: Embedding.Config = Embedding.Config()
        """The table of tokens."""

        norm: RMSNorm.Config = RMSNorm.Config()
        """Before the head."""

        head: Linear.Config | None = Linear.Config()
        """The projection to the vocabulary. None: it is tied, its weight is the embedding's."""

        max_seq_len: int
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        def blocks(self) -> list[Block.Config]:
            """The config of each block."""
            return [self.exceptions.get(layer, self.block) for layer in range(self.num_layers)]

        def validate(self) -> None:
            for name in ("vocab_size", "dim", "num_layers", "max_seq_len"):
                if getattr(self, name) < 1:
                    raise ValueError(f"Got {name} {getattr(self, name)}. A model has some of it. Set it to 1 or more.")
            if unknown := [layer for layer in self.exceptions if not 0 <= layer < self.num_layers]:
                raise ValueError(
                    f"Got exceptions for the blocks {unknown}. There are {self.num_layers}, numbered from 0. Remove "
                    "them, or raise num_layers."
                )
            for block in self.blocks():
                if block.attention.head_dim != self.rope.dim:
                    raise ValueError(
                        f"Got rope.dim {self.rope.dim} and head_dim {block.attention.head_dim}. All features of a head "
                        f"rotate. Set rope.dim to {block.attention.head_dim}."
                    )
                if block.attention.core != self.block.attention.core:
                    raise ValueError(
                        "Got blocks with different attention cores. The mask is realised once for all of them. Give "
                        "every exception the core of block."
                    )

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embedding: Embedding = config.embedding.build(vocab_size=config.vocab_size, dim=config.dim)
        self.rope: Rope = config.rope.build()
        self.layers = nn.ModuleList(block.build(dim=config.dim) for block in config.blocks())
        self.norm: RMSNorm = config.norm.build(dim=config.dim)
        self.head: nn.Module
        if config.head is None:
            self.head = TiedLinear.Config().build(embedding=self.embedding)
        else:
            self.head = config.head.build(in_features=config.dim, out_features=config.vocab_size)

    def forward(self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` for `tokens`, `positions` and `document_ids` `[B, T]`: whatever the head returns.

        Positions restart with each document, and documents do not see each other. Without `document_ids` a row is one
        document, whose positions rise.
        """
        x_BTD = self.embedding(tokens)
        cos, sin = self.rope(positions, x_BTD.dtype)
        mask = cast(Block, self.layers[0]).attention.core.realise(Mask.causal(positions, document_ids))
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin, mask)
        x_BTD = self.norm(x_BTD)
        return self.head(x_BTD)

    def roles(self) -> Roles:
        roles: Roles = {"embedding": "embedding", "norm": "norm", "head": "head"}
        if not self.config.exceptions:
            return roles | under("layers.*", cast(Block, self.layers[0]).roles())
        for number, layer in enumerate(self.layers):
            roles |= under(f"layers.{number}", cast(Block, layer).roles())
        return roles
