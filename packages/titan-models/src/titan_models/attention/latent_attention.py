"""Multi-head latent attention (MLA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_models.attention.base import Attention, RotaryPositions
from titan_models.layers.flops import Flops
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles
from titan_models.layers.rope import rotate_neighbors


class MultiHeadLatentAttention(Attention):
    """Self-attention whose keys and values are projected from one narrow latent of each token (DeepSeek-AI, 2024).

    Queries and keys have rotary and non-rotary features; all heads share the rotary features of the keys. The softmax
    scale is multiplied by `softmax_factor` of the RoPE scaling. Tensor parallelism replicates the down projections to
    latents and the norms of latents, and shards the up projections by heads.

    B batch, T tokens, D width, H heads, N non-rotary features, R rotary features, K = N + R, V features of a value,
    C features of the latent.
    """

    class Config(Attention.Config):
        head_dim: int
        """Number of non-rotary features of queries and keys in a head (qk_nope_head_dim)."""

        rotated_head_dim: int
        """Number of rotary features of queries and keys in a head (qk_rope_head_dim)."""

        value_head_dim: int
        """Number of features of a value in a head (v_head_dim)."""

        kv_rank: int
        """Width of the latent of keys and values (kv_lora_rank)."""

        q_rank: int | None = None
        """Width of the latent of queries (q_lora_rank). None: queries are projected from the hidden states."""

        latent_norm: RMSNorm.Config = RMSNorm.Config()
        """The norm of the latents."""

        input: Linear.Config = Linear.Config()
        """The down projections to latents and the up projections to queries, keys and values."""

        output: Linear.Config = Linear.Config()
        """The output projection."""

        def rotated_dim(self) -> int:
            return self.rotated_head_dim

        def validate(self) -> None:
            for name in ("num_heads", "head_dim", "rotated_head_dim", "value_head_dim", "kv_rank", "q_rank"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}.")

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        Attention.__init__(self, config)
        self.config = config
        self.qk_head_dim = config.head_dim + config.rotated_head_dim
        self.scale = self.qk_head_dim**-0.5
        q_dim, kv_dim = (
            config.num_heads * self.qk_head_dim,
            config.num_heads * (config.head_dim + config.value_head_dim),
        )
        self.q_down_proj: nn.Module = nn.Identity()
        self.q_norm: nn.Module = nn.Identity()
        if config.q_rank is not None:
            self.q_down_proj = config.input.build(in_features=dim, out_features=config.q_rank)
            self.q_norm = config.latent_norm.build(dim=config.q_rank)
        self.q_proj: Linear = config.input.build(in_features=config.q_rank or dim, out_features=q_dim)
        self.kv_down_proj: Linear = config.input.build(
            in_features=dim, out_features=config.kv_rank + config.rotated_head_dim
        )
        self.kv_norm: RMSNorm = config.latent_norm.build(dim=config.kv_rank)
        self.kv_proj: Linear = config.input.build(in_features=config.kv_rank, out_features=kv_dim)
        self.o_proj: Linear = config.output.build(
            in_features=config.num_heads * config.value_head_dim, out_features=dim
        )

    def forward(self, x_BTD: Tensor, rotary: RotaryPositions, mask: Any) -> Tensor:
        q_BTHK = self._queries(x_BTD, rotary)
        k_BTHK, v_BTHV = self._keys_and_values(x_BTD, rotary)
        output_BTHV = self.core(q_BTHK, k_BTHK, v_BTHV, mask, self.scale * rotary.softmax_factor)
        return self.o_proj(output_BTHV.flatten(2))

    def _queries(self, x_BTD: Tensor, rotary: RotaryPositions) -> Tensor:
        q_BTHK = self.q_proj(self.q_norm(self.q_down_proj(x_BTD))).unflatten(-1, (-1, self.qk_head_dim))
        q_BTHN, q_BTHR = q_BTHK.split([self.config.head_dim, self.config.rotated_head_dim], -1)
        return torch.cat((q_BTHN, rotate_neighbors(q_BTHR, rotary.cos, rotary.sin)), -1)

    def _keys_and_values(self, x_BTD: Tensor, rotary: RotaryPositions) -> tuple[Tensor, Tensor]:
        c = self.config
        latent_BTC, k_BTR = self.kv_down_proj(x_BTD).split([c.kv_rank, c.rotated_head_dim], -1)
        kv_BTHX = self.kv_proj(self.kv_norm(latent_BTC)).unflatten(-1, (-1, c.head_dim + c.value_head_dim))
        k_BTHN, v_BTHV = kv_BTHX.split([c.head_dim, c.value_head_dim], -1)
        k_BT1R = rotate_neighbors(k_BTR.unsqueeze(2), rotary.cos, rotary.sin)
        return torch.cat((k_BTHN, k_BT1R.expand(-1, -1, k_BTHN.shape[2], -1)), -1), v_BTHV

    def own_flops(self, seq_len: int) -> Flops:
        full = 6 * self.config.num_heads * (self.qk_head_dim + self.config.value_head_dim) * seq_len
        return Flops(full=full, causal=full // 2)

    def roles(self) -> Roles:
        """Return the roles. Latents have none: each rank of a region computes all of them, for its own heads."""
        heads = {"num_heads": self.config.num_heads, "packed": 1}  # one matrix, head by head; head widths differ
        return {
            "": "region",
            "q_proj": ("colwise", heads),
            "kv_proj": ("colwise", heads),
            "o_proj": "rowwise",
            "core": "attention",
        }
