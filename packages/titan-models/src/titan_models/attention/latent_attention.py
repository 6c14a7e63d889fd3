"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_models.attention.base import Attention, Places
from titan_models.layers.flops import Flops
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles
from titan_models.layers.rope import rotate_neighbors


class MultiHeadLatentAttention(Attention):
    """Self-attention whose keys and values come from one narrow latent of each token (DeepSeek-AI, 2024).

    Queries and keys have features that rotate and features that do not; those of keys that rotate are the same for all
    heads. The softmax scale is multiplied by the factor of rope's scaling. The projections into latents, and the norms
    of these, are whole on every rank of a region; the projections out of them are split by heads.

    B batch, T tokens, D width, H heads, N features that do not rotate, R that do, K = N + R, V features of a value,
    C features of the latent.
    """

    class Config(Attention.Config):
        head_dim: int
        """Features of queries and keys, in a head, that do not rotate."""

        rotated_head_dim: int
        """Features of queries and keys, in a head, that do."""

        value_head_dim: int
        """Features of a value."""

        kv_rank: int
        """Width of the latent that keys and values are made of."""

        q_rank: int | None = None
        """Width of the latent that queries are made of. None: they are made of the stream."""

        latent_norm: RMSNorm.Config = RMSNorm.Config()
        """Of the latents."""

        input: Linear.Config = Linear.Config()
        """The projections to latents, and of them to queries, keys and values."""

        output: Linear.Config = Linear.Config()
        """The projection back."""

        def rotated_dim(self) -> int:
            return self.rotated_head_dim

        def validate(self) -> None:
            for name in ("num_heads", "head_dim", "rotated_head_dim", "value_head_dim", "kv_rank", "q_rank"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ValueError(f"Got {name} {value}. Attention has some of it. Set it to 1 or more.")

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

    def forward(self, x_BTD: Tensor, places: Places, mask: Any) -> Tensor:
        q_BTHK = self._queries(x_BTD, places)
        k_BTHK, v_BTHV = self._keys_and_values(x_BTD, places)
        output_BTHV = self.core(q_BTHK, k_BTHK, v_BTHV, mask, self.scale * places.softmax_factor)
        return self.o_proj(output_BTHV.flatten(2))

    def _queries(self, x_BTD: Tensor, places: Places) -> Tensor:
        q_BTHK = self.q_proj(self.q_norm(self.q_down_proj(x_BTD))).unflatten(-1, (-1, self.qk_head_dim))
        q_BTHN, q_BTHR = q_BTHK.split([self.config.head_dim, self.config.rotated_head_dim], -1)
        return torch.cat((q_BTHN, rotate_neighbors(q_BTHR, places.cos, places.sin)), -1)

    def _keys_and_values(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        c = self.config
        latent_BTC, k_BTR = self.kv_down_proj(x_BTD).split([c.kv_rank, c.rotated_head_dim], -1)
        kv_BTHX = self.kv_proj(self.kv_norm(latent_BTC)).unflatten(-1, (-1, c.head_dim + c.value_head_dim))
        k_BTHN, v_BTHV = kv_BTHX.split([c.head_dim, c.value_head_dim], -1)
        k_BT1R = rotate_neighbors(k_BTR.unsqueeze(2), places.cos, places.sin)
        return torch.cat((k_BTHN, k_BT1R.expand(-1, -1, k_BTHN.shape[2], -1)), -1), v_BTHV

    def own_flops(self, seq_len: int) -> Flops:
        full = 6 * self.config.num_heads * (self.qk_head_dim + self.config.value_head_dim) * seq_len
        return Flops(full=full, causal=full // 2)

    def roles(self) -> Roles:
        """Latents are in no role: each rank of a region makes all of them, for the heads that it has."""
        heads = {"num_heads": self.config.num_heads, "packed": 1}  # a head of one is as wide as it likes
        return {
            "": "region",
            "q_proj": ("colwise", heads),
            "kv_proj": ("colwise", heads),
            "o_proj": "rowwise",
            "core": "attention",
        }
