"""The decoder that language model families are configs of: an embedding, a stack of blocks, a norm and a head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from titan_models.attention.base import Masks, Places
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
    """Token ids to logits. B batch, T tokens, D width, V vocabulary.

    A family derives from it, states in its config how long its sequences are, and adds its Hugging Face adapter.
    """

    config: Config

    class Config(Model.Config):
        dim: int
        """Width of the stream."""

        num_layers: int
        """Blocks."""

        block: Block.Config
        """Every block."""

        layer_overrides: dict[str, Block.Config] = {}
        """Blocks that are different, by their numbers as in a slice: "0", "0:3", or "1::2" for every second."""

        rope: Rope.Config
        """Rotary positions of queries and keys."""

        embedding: Embedding.Config = Embedding.Config()
        """The table of tokens."""

        norm: RMSNorm.Config = RMSNorm.Config()
        """Before the head."""

        head: Linear.Config | None = Linear.Config()
        """The projection to the vocabulary. None: it is tied, its weight is the embedding's."""

        def blocks(self) -> list[Block.Config]:
            """The config of each block."""
            blocks = [self.block] * self.num_layers
            for numbers, block in self.layer_overrides.items():
                for layer in _layers(numbers, self.num_layers):
                    blocks[layer] = block
            return blocks

        def routers(self) -> list[Router.Config]:
            """The config of the router of each block that has experts."""
            feed_forwards = [block.feed_forward for block in self.blocks()]
            return [layer.router for layer in feed_forwards if isinstance(layer, MoE.Config)]

        def validate(self) -> None:
            for name in ("vocab_size", "dim", "num_layers", "max_seq_len"):
                if getattr(self, name) < 1:
                    raise ValueError(f"Got {name} {getattr(self, name)}. A model has some of it. Set it to 1 or more.")
            named = Counter(layer for numbers in self.layer_overrides for layer in _layers(numbers, self.num_layers))
            if twice := sorted(layer for layer, times in named.items() if times > 1):
                raise ValueError(
                    f"Got layer_overrides that name the blocks {twice} twice. A block is one. Name it once."
                )
            for block in self.blocks():
                rotated = block.attention.rotated_dim()
                if rotated not in (None, self.rope.dim):
                    raise ValueError(
                        f"Got rope.dim {self.rope.dim}, and heads of which {rotated} features rotate. Rope has an "
                        f"angle for each pair of them. Set rope.dim to {rotated}."
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
        """Logits `[B, T, V]` for `tokens`, `positions` and `document_ids` `[B, T]`: whatever the head returns.

        Positions restart with each document, and documents do not see each other. Without `document_ids` a row is one
        document, whose positions rise.
        """
        x_BTD, places, masks = self.enter(tokens, positions, document_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, places, masks.of(cast(Block, layer).attention))
        return self.head(self.norm(x_BTD))

    def enter(self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Places, Masks]:
        """What the first block is given, and all others: the stream `[B, T, D]`, places and masks."""
        x_BTD = self.embedding(tokens)
        cos, sin = self.rope(positions, x_BTD.dtype)
        return x_BTD, Places(positions, cos, sin, self.rope.softmax_factor), Masks(positions, document_ids)

    def generate(self, prompts: Sequence[Sequence[int]], **choices: Any) -> list[list[int]]:
        """What the model continues each prompt with: `titan_models.generate(self, prompts, **choices)`."""
        return generate(self, prompts, **choices)

    def roles(self) -> Roles:
        roles: Roles = {"embedding": "embedding", "norm": "norm", "head": "head"}
        if not self.config.layer_overrides:
            return roles | under("layers.*", cast(Block, self.layers[0]).roles())
        for number, layer in enumerate(self.layers):
            roles |= under(f"layers.{number}", cast(Block, layer).roles())
        return roles


def _layers(numbers: str, num_layers: int) -> range:
    """The layers that "3", "0:3" or "1::2" are. Raises ValueError for what is no slice, and for none."""
    if not re.fullmatch(r"\d+|\d*:\d*(:[1-9]\d*)?", numbers):
        raise ValueError(
            f"Got layer_overrides for the blocks {numbers!r}. They are numbers as in a slice. Write '3', '0:3' or '1::2'."
        )
    start, *rest = (int(number) if number else None for number in numbers.split(":"))
    bounds = slice(start, *rest) if rest else slice(start, cast(int, start) + 1)
    if not (layers := range(num_layers)[bounds]):
        raise ValueError(
            f"Got layer_overrides for the blocks {numbers!r}. There are {num_layers}, numbered from 0. Remove them, or "
            "raise num_layers."
        )
    return layers
