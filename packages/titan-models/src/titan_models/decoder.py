"""The decoder that all language model families share: an embedding, a stack of blocks, a norm and a head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from titan_models.attention.base import MaskCache, RotaryPositions
from titan_models.block import Block
from titan_models.generation.generate import generate
from titan_models.layers.embedding import Embedding
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles, under
from titan_models.layers.rope import Rope
from titan_models.layers.tied import TiedLinear
from titan_models.model import Model
from titan_models.moe import MoE, Router


class Decoder(Model):
    """A decoder-only transformer: token ids to logits. B batch, T tokens, D width, V vocabulary.

    A model family subclasses it to set the default of `max_seq_len` and to add its Hugging Face adapter.
    """

    config: Config

    class Config(Model.Config):
        dim: int
        """Width of the hidden states (hidden_size)."""

        num_layers: int
        """Number of blocks."""

        block: Block.Config
        """The config of all blocks that `layer_overrides` does not replace."""

        layer_overrides: dict[str, Block.Config] = {}
        """Configs of single blocks, keyed by block number or slice: "0", "0:3", or "1::2" for every second block."""

        rope: Rope.Config
        """The rotary position embedding of queries and keys."""

        embedding: Embedding.Config = Embedding.Config()
        """The token embedding."""

        norm: RMSNorm.Config = RMSNorm.Config()
        """The norm before the head."""

        head: Linear.Config | None = Linear.Config()
        """The projection to the vocabulary. None: the head is tied and uses the weight of the embedding."""

        def blocks(self) -> list[Block.Config]:
            """Return the config of each block, in order."""
            blocks = [self.block] * self.num_layers
            for key, block in self.layer_overrides.items():
                for layer in _layers(key, self.num_layers):
                    blocks[layer] = block
            return blocks

        def routers(self) -> list[Router.Config]:
            """Return the router config of each block that has experts, in order."""
            feed_forwards = [block.feed_forward for block in self.blocks()]
            return [layer.router for layer in feed_forwards if isinstance(layer, MoE.Config)]

        def validate(self) -> None:
            for name in ("vocab_size", "dim", "num_layers", "max_seq_len"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
            matches = Counter(layer for key in self.layer_overrides for layer in _layers(key, self.num_layers))
            if duplicates := sorted(layer for layer, count in matches.items() if count > 1):
                raise ValueError(
                    f"Each block must match at most one key of layer_overrides, got several for blocks {duplicates}."
                )
            for block in self.blocks():
                rotated = block.attention.rotated_dim()
                if rotated not in (None, self.rope.dim):
                    raise ValueError(
                        f"rope.dim must be {rotated}, the number of rotary features of each head, got {self.rope.dim}."
                    )

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embedding: Embedding = config.embedding.build(vocab_size=config.vocab_size, dim=config.dim)
        self.rope: Rope = config.rope.build()
        self.layers = nn.ModuleList(block.build(dim=config.dim) for block in config.blocks())
        self.norm: nn.Module = config.norm.build(dim=config.dim)
        self.head: nn.Module
        if config.head is None:
            self.head = TiedLinear.Config().build(embedding=self.embedding)
        else:
            self.head = config.head.build(in_features=config.dim, out_features=config.vocab_size)

    def forward(self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the output of the head, logits `[B, T, V]`, for `tokens`, `positions` and `document_ids` `[B, T]`.

        Positions restart with each document, and tokens do not attend across documents. Without `document_ids` each
        sequence is one document, and its positions must increase.
        """
        x_BTD, rotary, masks = self.enter(tokens, positions, document_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotary, masks.get(cast(Block, layer).attention))
        return self.head(self.norm(x_BTD))

    def enter(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None
    ) -> tuple[Tensor, RotaryPositions, MaskCache]:
        """Return the inputs of the first block: hidden states `[B, T, D]`, rotary positions and attention masks."""
        x_BTD = self.embedding(tokens)
        cos, sin = self.rope(positions, x_BTD.dtype)
        return x_BTD, RotaryPositions(positions, cos, sin, self.rope.softmax_factor), MaskCache(positions, document_ids)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Return the continuation of each prompt: `titan_models.generate(self, prompts, **options)`."""
        return generate(self, prompts, **options)

    def roles(self) -> Roles:
        roles: Roles = {"embedding": "embedding", "norm": "norm", "head": "head"}
        if not self.config.layer_overrides:
            return roles | under("layers.*", cast(Block, self.layers[0]).roles())
        for number, layer in enumerate(self.layers):
            roles |= under(f"layers.{number}", cast(Block, layer).roles())
        return roles


def _layers(key: str, num_layers: int) -> range:
    """Return the block numbers that "3", "0:3" or "1::2" selects.

    Raises ValueError for a key that is no number or slice, and for one that selects no block.
    """
    if not re.fullmatch(r"\d+|\d*:\d*(:[1-9]\d*)?", key):
        raise ValueError(
            f"Keys of layer_overrides must be block numbers or slices such as '3', '0:3' or '1::2', got {key!r}."
        )
    start, *rest = (int(number) if number else None for number in key.split(":"))
    bounds = slice(start, *rest) if rest else slice(start, cast(int, start) + 1)
    if not (layers := range(num_layers)[bounds]):
        raise ValueError(
            f"Each key of layer_overrides must select at least one of the {num_layers} blocks (numbered from 0), got "
            f"{key!r}. Remove the key, or raise num_layers."
        )
    return layers
