"""Grouped-query attention (GQA)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from titan_models.attention.base import Attention, RotaryPositions
from titan_models.attention.temperature import Temperature
from titan_models.initialization.initializers import Initializer
from titan_models.layers.flops import Flops
from titan_models.layers.layer import new_parameter
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles
from titan_models.layers.rope import rotate, rotate_neighbors


class GroupedQueryAttention(Attention):
    """Grouped-query self-attention (Ainslie et al., 2023), with or without rotary positions.

    B batch, T tokens, D width, H query heads, G key-value heads, K features of a head. The forward does not use the
    number of heads, so that a tensor-parallel rank may hold some of the heads.
    """

    class Config(Attention.Config):
        num_kv_heads: int
        """Number of key-value heads; each is shared by num_heads / num_kv_heads query heads."""

        head_dim: int
        """Number of features of a head."""

        input: Linear.Config = Linear.Config()
        """The query, key and value projections."""

        output: Linear.Config = Linear.Config()
        """The output projection."""

        qk_norm: RMSNorm.Config | None = None
        """The norm of each head of queries and keys (QK norm), before rotation. None: no norm."""

        sink_init: Initializer.Config | None = None
        """The initializer of attention sinks, a learned logit of each head for a key with value 0. None: no sinks."""

        rotation: Literal["halves", "neighbors"] | None = "halves"
        """Pairs of rotary features: i and i + K/2 (halves) or 2i and 2i + 1 (neighbors). None: no rotation (NoPE)."""

        temperature: Temperature.Config | None = None
        """The scaling of queries by position. None: no scaling."""

        def rotated_dim(self) -> int | None:
            return None if self.rotation is None else self.head_dim

        def validate(self) -> None:
            if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or self.num_heads % self.num_kv_heads:
                raise ValueError(
                    "num_heads must be a multiple of num_kv_heads, and both and head_dim at least 1, got num_heads "
                    f"{self.num_heads}, num_kv_heads {self.num_kv_heads} and head_dim {self.head_dim}."
                )

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        Attention.__init__(self, config)
        self.config = config
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        heads_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj: Linear = config.input.build(in_features=dim, out_features=heads_dim)
        self.k_proj: Linear = config.input.build(in_features=dim, out_features=kv_dim)
        self.v_proj: Linear = config.input.build(in_features=dim, out_features=kv_dim)
        self.o_proj: Linear = config.output.build(in_features=heads_dim, out_features=dim)
        self.q_norm: nn.Module = _head_norm(config)
        self.k_norm: nn.Module = _head_norm(config)
        self.sinks = None if config.sink_init is None else new_parameter(config.num_heads)
        self.temperature: Temperature | None = None if config.temperature is None else config.temperature.build()

    def forward(self, x_BTD: Tensor, rotary: RotaryPositions, mask: Any) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = self._rotate(self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim)), rotary)
        k_BTGK = self._rotate(self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim)), rotary)
        v_BTGK = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        if self.temperature is not None:
            q_BTHK = self.temperature(q_BTHK, rotary.positions)
        sinks = () if self.sinks is None else (self.sinks,)
        output_BTHK = self.core(q_BTHK, k_BTGK, v_BTGK, mask, self.scale, *sinks)
        return self.o_proj(output_BTHK.flatten(2))

    def _rotate(self, x: Tensor, rotary: RotaryPositions) -> Tensor:
        if self.config.rotation is None:
            return x
        apply = rotate if self.config.rotation == "halves" else rotate_neighbors
        return apply(x, rotary.cos, rotary.sin)

    def initializers(self) -> dict[str, Initializer]:
        return {} if self.config.sink_init is None else {"sinks": self.config.sink_init.build()}

    def own_flops(self, seq_len: int) -> Flops:
        full = 6 * self.config.num_heads * 2 * self.config.head_dim * seq_len
        return Flops(full=full, causal=full // 2)

    def roles(self) -> Roles:
        """Return the roles. The QK norms have none: they are replicated on each rank of a region, over its heads."""
        kv_heads = {"num_heads": self.config.num_kv_heads}
        return {
            "": "region",
            "q_proj": ("colwise", {"num_heads": self.config.num_heads}),
            "k_proj": ("colwise", kv_heads),
            "v_proj": ("colwise", kv_heads),
            "o_proj": "rowwise",
            "core": "attention",
            **({} if self.sinks is None else {"sinks": "per_head"}),
        }


def _head_norm(config: GroupedQueryAttention.Config) -> nn.Module:
    return nn.Identity() if config.qk_norm is None else config.qk_norm.build(dim=config.head_dim)
