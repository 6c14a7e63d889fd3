"""Flavors of Qwen3: the released sizes, and two small ones for development. Each call returns a new config.

Initial weights are distributed as in torchtitan 0.3.0 (see docs/concepts/initial_weights.md).
"""

from __future__ import annotations

import copy
import math

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.block import Block
from titan_models.initialization.initializers import Normal
from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.rope import Rope
from titan_models.layers.swiglu import SwiGLU
from titan_models.moe import MoE, SwiGLUExperts, TopKRouter
from titan_models.qwen3.model import Qwen3


def qwen3_debug() -> Qwen3.Config:
    """5 million parameters, with a vocabulary of 2048, for a laptop."""
    return _qwen3(
        vocab_size=2048,
        dim=256,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        hidden_dim=768,
        tied=True,
    )


def qwen3_moe_debug() -> Qwen3.Config:
    """11 million parameters, 8 experts, 2 per token, with a vocabulary of 2048, for a laptop."""
    return _qwen3(
        vocab_size=2048,
        dim=256,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        hidden_dim=256,
        num_experts=8,
        top_k=2,
    )


def qwen3_0_6b() -> Qwen3.Config:
    """Qwen3 0.6B."""
    return _qwen3(dim=1024, num_layers=28, num_heads=16, num_kv_heads=8, hidden_dim=3072, tied=True)


def qwen3_1_7b() -> Qwen3.Config:
    """Qwen3 1.7B."""
    return _qwen3(dim=2048, num_layers=28, num_heads=16, num_kv_heads=8, hidden_dim=6144, tied=True)


def qwen3_4b() -> Qwen3.Config:
    """Qwen3 4B."""
    return _qwen3(dim=2560, num_layers=36, num_heads=32, num_kv_heads=8, hidden_dim=9728, tied=True)


def qwen3_8b() -> Qwen3.Config:
    """Qwen3 8B."""
    return _qwen3(dim=4096, num_layers=36, num_heads=32, num_kv_heads=8, hidden_dim=12288)


def qwen3_14b() -> Qwen3.Config:
    """Qwen3 14B."""
    return _qwen3(dim=5120, num_layers=40, num_heads=40, num_kv_heads=8, hidden_dim=17408)


def qwen3_32b() -> Qwen3.Config:
    """Qwen3 32B."""
    return _qwen3(dim=5120, num_layers=64, num_heads=64, num_kv_heads=8, hidden_dim=25600)


def qwen3_30b_a3b() -> Qwen3.Config:
    """Qwen3 30B-A3B: 128 experts, 8 per token, 3 billion active parameters."""
    return _qwen3(dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, hidden_dim=768, num_experts=128)


def qwen3_235b_a22b() -> Qwen3.Config:
    """Qwen3 235B-A22B: 128 experts, 8 per token, 22 billion active parameters."""
    return _qwen3(dim=4096, num_layers=94, num_heads=64, num_kv_heads=4, hidden_dim=1536, num_experts=128)


def _qwen3(
    *,
    vocab_size: int = 151_936,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 128,
    hidden_dim: int,
    num_experts: int | None = None,
    top_k: int = 8,
    tied: bool = False,
) -> Qwen3.Config:
    feed_forward: FeedForward.Config = SwiGLU.Config(hidden_dim=hidden_dim)
    output = Linear.Config()
    if num_experts is not None:
        residual = Normal.Config(std=0.02 / math.sqrt(2 * num_layers))
        output = Linear.Config(weight_init=residual)
        feed_forward = MoE.Config(
            router=TopKRouter.Config(num_experts=num_experts, top_k=top_k, renormalize=True),
            experts=SwiGLUExperts.Config(hidden_dim=hidden_dim, down_init=copy.copy(residual)),
        )
    return Qwen3.Config(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        block=Block.Config(
            attention=GroupedQueryAttention.Config(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                output=output,
                qk_norm=RMSNorm.Config(eps=1e-6),
            ),
            feed_forward=feed_forward,
            norm=RMSNorm.Config(eps=1e-6),
        ),
        rope=Rope.Config(dim=head_dim, theta=1_000_000.0),
        norm=RMSNorm.Config(eps=1e-6),
        head=None if tied else Linear.Config(),
    )
