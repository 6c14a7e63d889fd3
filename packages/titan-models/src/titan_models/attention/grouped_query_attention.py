"""Grouped-query attention."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from titan_models.attention.base import Attention, Places
from titan_models.attention.temperature import Temperature
from titan_models.initialization.initializers import Initializer
from titan_models.layers.flops import Flops
from titan_models.layers.layer import new_parameter
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.roles import Roles
from titan_models.layers.rope import rotate, rotate_neighbors


class GroupedQueryAttention(Attention):
    """Grouped-query self-attention (Ainslie et al., 2023), with rotary positions or without.

    B batch, T tokens, D width, H query heads, G key-value heads, K features of a head. The number of heads is nowhere
    in the forward: a rank may hold some of them.
    """

    class Config(Attention.Config):
        num_kv_heads: int
        """Key-value heads; each serves num_heads / num_kv_heads query heads."""

        head_dim: int
        """Features of a head."""

        input: Linear.Config = Linear.Config()
        """The projections to queries, keys and values."""

        output: Linear.Config = Linear.Config()
        """The projection back."""

        qk_norm: RMSNorm.Config | None = None
        """Of queries and keys, head by head, before they rotate; a gain for each of the two. None: there is none."""

        sink_init: Initializer.Config | None = None
        """How sinks are drawn: a learned score in each head of one key more, without a value. None: there are none."""

        rotation: Literal["halves", "neighbors"] | None = "halves"
        """Which features of a head rotate together: i with i + K/2, or 2i with 2i + 1. None: positions rotate none."""

        temperature: Temperature.Config | None = None
        """How queries grow with their positions. None: they do not."""

        def rotated_dim(self) -> int | None:
            return None if self.rotation is None else self.head_dim

        def validate(self) -> None:
            if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"Got {self.num_heads} heads, {self.num_kv_heads} key-value heads and head_dim {self.head_dim}. "
                    "Each key-value head serves as many heads as any other. Set num_heads to a multiple of "
                    "num_kv_heads, all above 0."
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

    def forward(self, x_BTD: Tensor, places: Places, mask: Any) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = self._rotate(self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim)), places)
        k_BTGK = self._rotate(self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim)), places)
        v_BTGK = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        if self.temperature is not None:
            q_BTHK = self.temperature(q_BTHK, places.positions)
        sinks = () if self.sinks is None else (self.sinks,)
        output_BTHK = self.core(q_BTHK, k_BTGK, v_BTGK, mask, self.scale, *sinks)
        return self.o_proj(output_BTHK.flatten(2))

    def _rotate(self, x: Tensor, places: Places) -> Tensor:
        if self.config.rotation is None:
            return x
        together = rotate if self.config.rotation == "halves" else rotate_neighbors
        return together(x, places.cos, places.sin)

    def initializers(self) -> dict[str, Initializer]:
        return {} if self.config.sink_init is None else {"sinks": self.config.sink_init.build()}

    def own_flops(self, seq_len: int) -> Flops:
        full = 6 * self.config.num_heads * 2 * self.config.head_dim * seq_len
        return Flops(full=full, causal=full // 2)

    def roles(self) -> Roles:
        """The norms of heads are in no role: whole on every rank of a region, which holds some of the heads."""
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
