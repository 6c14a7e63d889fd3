"""Multi-token prediction (MTP): one additional block, which predicts the token after next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_models.attention.base import RotaryPositions
from titan_models.block import Block
from titan_models.layers.flops import Flops, matmul_flops
from titan_models.layers.layer import Layer
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles


class MultiTokenPredictionBlock(Block, Layer):
    """The MTP block at the end of a stack, over the hidden state of each token and the embedding of the next token.

    It also applies the final norm of the stack, so that it maps the residual stream to inputs of the head: `[B, T, D]`
    for the next token, or `[B, 2, T, D]` for the next token and the token after next.
    B batch, T tokens, D width. Source: DeepSeek-AI, "DeepSeek-V3 technical report" (2024), section 2.2.
    """

    class Config(Block.Config):
        join: Linear.Config = Linear.Config()
        """The projection of the concatenated next-token embedding and hidden state to the input of the block."""

    def __init__(self, config: Config, *, dim: int, final_norm: RMSNorm.Config, vocab_size: int) -> None:
        super().__init__(config, dim=dim)
        self.head_size = dim * vocab_size
        self.final_norm: RMSNorm = final_norm.build(dim=dim)
        self.token_norm: RMSNorm = config.norm.build(dim=dim)
        self.stream_norm: RMSNorm = config.norm.build(dim=dim)
        self.join_proj: Linear = config.join.build(in_features=2 * dim, out_features=dim)
        self.output_norm: RMSNorm = final_norm.build(dim=dim)

    def forward(self, x_BTD: Tensor, rotary: RotaryPositions, mask: Any, next_BTD: Tensor | None = None) -> Tensor:
        """Return the inputs of the head; `next_BTD` is the embedding of the next tokens. None: no MTP output."""
        hidden_BTD = self.final_norm(x_BTD)
        if next_BTD is None:
            return hidden_BTD
        joined_BTD = self.join_proj(torch.cat((self.token_norm(next_BTD), self.stream_norm(hidden_BTD)), -1))
        mtp_BTD = super().forward(joined_BTD, rotary, mask)
        return torch.stack((hidden_BTD, self.output_norm(mtp_BTD)), 1)

    def own_flops(self, seq_len: int) -> Flops:
        """Return the FLOPs of the second product with the head, for the MTP output."""
        return matmul_flops(self.head_size)

    def roles(self) -> Roles:
        norms = dict.fromkeys(("final_norm", "token_norm", "stream_norm", "output_norm"), "norm")
        return super().roles() | norms
