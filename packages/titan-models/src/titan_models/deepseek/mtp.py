"""Multi-token prediction: one more block, which predicts the token after the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_models.attention.base import Places
from titan_models.block import Block
from titan_models.layers.flops import Flops, matmul_flops
from titan_models.layers.layer import Layer
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles


class MultiTokenPredictionBlock(Block, Layer):
    """The last block of a stack, over what the stack makes of a token and over the token that follows.

    It holds the stack's final norm, so that what goes in is the stream and what comes out is for the head: of the
    token's own place alone, `[B, T, D]`, or with that of the token after next behind it, `[B, 2, T, D]`.
    B batch, T tokens, D width. Source: DeepSeek-AI, "DeepSeek-V3 technical report" (2024), section 2.2.
    """

    class Config(Block.Config):
        join: Linear.Config = Linear.Config()
        """The projection of a next token and a stream, beside each other, into the block's own stream."""

    def __init__(self, config: Config, *, dim: int, final_norm: RMSNorm.Config, vocab_size: int) -> None:
        super().__init__(config, dim=dim)
        self.head_size = dim * vocab_size
        self.final_norm: RMSNorm = final_norm.build(dim=dim)
        self.token_norm: RMSNorm = config.norm.build(dim=dim)
        self.stream_norm: RMSNorm = config.norm.build(dim=dim)
        self.join_proj: Linear = config.join.build(in_features=2 * dim, out_features=dim)
        self.output_norm: RMSNorm = final_norm.build(dim=dim)

    def forward(self, x_BTD: Tensor, places: Places, mask: Any, next_BTD: Tensor | None = None) -> Tensor:
        """`next_BTD` is the embedding of the token that follows each; without it nothing is looked ahead."""
        own_BTD = self.final_norm(x_BTD)
        if next_BTD is None:
            return own_BTD
        joined_BTD = self.join_proj(torch.cat((self.token_norm(next_BTD), self.stream_norm(own_BTD)), -1))
        ahead_BTD = super().forward(joined_BTD, places, mask)
        return torch.stack((own_BTD, self.output_norm(ahead_BTD)), 1)

    def own_flops(self, seq_len: int) -> Flops:
        """The head's second product: it multiplies what is ahead, too."""
        return matmul_flops(self.head_size)

    def roles(self) -> Roles:
        norms = dict.fromkeys(("final_norm", "token_norm", "stream_norm", "output_norm"), "norm")
        return super().roles() | norms
