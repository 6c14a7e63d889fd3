"""Flavors of Llama 3: the released sizes, and a small one for development. Each call returns a new config.

Initial weights are distributed as in torchtitan 0.3.0 (see docs/concepts/initial_weights.md).
"""

from __future__ import annotations

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.block import Block
from titan_models.initialization.initializers import FanInNormal, Initializer, Normal
from titan_models.layers.embedding import Embedding
from titan_models.layers.linear import Linear, residual_linear
from titan_models.layers.rope import Llama3Scaling, Rope
from titan_models.layers.swiglu import SwiGLU
from titan_models.llama3.model import Llama3


def llama3_debug() -> Llama3.Config:
    """6 million parameters, with a vocabulary of 2048, for a laptop."""
    return _llama3(
        vocab_size=2048,
        dim=256,
        num_layers=6,
        num_heads=16,
        num_kv_heads=16,
        head_dim=16,
        hidden_dim=768,
        rope_factor=8,
    )


def llama3_1b() -> Llama3.Config:
    """Llama 3.2 1B."""
    return _llama3(
        dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, hidden_dim=8192, rope_factor=32, tied=True
    )


def llama3_3b() -> Llama3.Config:
    """Llama 3.2 3B."""
    return _llama3(
        dim=3072, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, hidden_dim=8192, rope_factor=32, tied=True
    )


def llama3_8b() -> Llama3.Config:
    """Llama 3.1 8B."""
    return _llama3(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, hidden_dim=14336, rope_factor=8)


def llama3_70b() -> Llama3.Config:
    """Llama 3.1 70B."""
    return _llama3(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, hidden_dim=28672, rope_factor=8)


def llama3_405b() -> Llama3.Config:
    """Llama 3.1 405B."""
    return _llama3(
        dim=16384, num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128, hidden_dim=53248, rope_factor=8
    )


def _llama3(
    *,
    vocab_size: int = 128_256,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_dim: int,
    rope_factor: float,
    tied: bool = False,
) -> Llama3.Config:
    embedding_init: Initializer.Config = FanInNormal.Config() if tied else Normal.Config(std=1.0)
    return Llama3.Config(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        block=Block.Config(
            attention=GroupedQueryAttention.Config(
                num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, output=residual_linear()
            ),
            feed_forward=SwiGLU.Config(hidden_dim=hidden_dim, up=residual_linear(), down=residual_linear()),
        ),
        rope=Rope.Config(dim=head_dim, theta=500_000.0, scaling=Llama3Scaling.Config(factor=rope_factor)),
        embedding=Embedding.Config(weight_init=embedding_init),
        head=None if tied else Linear.Config(weight_init=FanInNormal.Config()),
    )
