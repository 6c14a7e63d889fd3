"""Flavors of the text model of Llama 4: the released sizes, and a small one. Each call returns a new config.

Initial weights are distributed as in torchtitan 0.2 (see docs/concepts/initial_weights.md).
"""

from __future__ import annotations

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.mask import Chunks
from titan_models.attention.temperature import Temperature
from titan_models.block import Block
from titan_models.initialization.initializers import DepthScaledNormal, FanInNormal, Normal
from titan_models.layers.embedding import Embedding
from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.linear import Linear, residual_linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.rope import Llama3Scaling, Rope
from titan_models.layers.swiglu import SwiGLU
from titan_models.llama4.model import Llama4
from titan_models.moe import MoE, SwiGLUExperts, TopKRouter


def llama4_debug() -> Llama4.Config:
    """15 million parameters, 8 experts in every second block, chunks of 64 tokens, for a laptop."""
    return _llama4(
        vocab_size=2048,
        dim=256,
        num_layers=6,
        num_heads=16,
        num_kv_heads=16,
        head_dim=16,
        dense_dim=768,
        expert_dim=512,
        num_experts=8,
        chunk=64,
        qk_norm=True,
        scaled=True,
        max_seq_len=131_072,
    )


def llama4_scout() -> Llama4.Config:
    """Llama 4 Scout 17B-16E: 16 experts in every block, 1 per token."""
    return _llama4(dense_dim=None, num_experts=16, qk_norm=True, scaled=True, max_seq_len=10_485_760)


def llama4_maverick() -> Llama4.Config:
    """Llama 4 Maverick 17B-128E: 128 experts in every second block, 1 per token."""
    return _llama4(num_experts=128, qk_norm=False, scaled=False, max_seq_len=1_048_576)


def _llama4(
    *,
    vocab_size: int = 202_048,
    dim: int = 5120,
    num_layers: int = 48,
    num_heads: int = 40,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dense_dim: int | None = 16_384,
    expert_dim: int = 8192,
    num_experts: int,
    chunk: int = 8192,
    qk_norm: bool,
    scaled: bool,
    max_seq_len: int,
) -> Llama4.Config:
    """Return a config; `dense_dim` is the width of every second feed-forward layer. None: all have experts."""

    def block(rotary: bool, with_experts: bool) -> Block.Config:
        attention = GroupedQueryAttention.Config(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, output=residual_linear()
        )
        if rotary:
            attention.rotation = "neighbors"
            attention.qk_norm = RMSNorm.Config(weight_init=None) if qk_norm else None
            attention.mask_modifiers = [Chunks.Config(size=chunk)]
        else:
            attention.rotation = None
            attention.temperature = Temperature.Config(step=chunk)
        if with_experts or dense_dim is None:
            return Block.Config(attention=attention, feed_forward=_moe(expert_dim, num_experts))
        dense = SwiGLU.Config(hidden_dim=dense_dim, up=residual_linear(), down=residual_linear())
        return Block.Config(attention=attention, feed_forward=dense)

    layer_overrides = {"3::4": block(rotary=False, with_experts=True)}
    if dense_dim is not None:
        layer_overrides["1::4"] = block(rotary=True, with_experts=True)
    return Llama4.Config(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        block=block(rotary=True, with_experts=False),
        layer_overrides=layer_overrides,
        rope=Rope.Config(
            dim=head_dim,
            theta=500_000.0,
            scaling=Llama3Scaling.Config(factor=16, low_freq_factor=1, high_freq_factor=1) if scaled else None,
        ),
        embedding=Embedding.Config(weight_init=Normal.Config(std=1.0)),
        head=Linear.Config(weight_init=FanInNormal.Config()),
        max_seq_len=max_seq_len,
    )


def _moe(expert_dim: int, num_experts: int) -> FeedForward.Config:
    return MoE.Config(
        router=TopKRouter.Config(
            num_experts=num_experts, top_k=1, score="sigmoid", weight_init=DepthScaledNormal.Config()
        ),
        experts=SwiGLUExperts.Config(
            hidden_dim=expert_dim, up_init=DepthScaledNormal.Config(), down_init=DepthScaledNormal.Config()
        ),
        weighted="input",
        shared=SwiGLU.Config(hidden_dim=expert_dim, up=residual_linear(), down=residual_linear()),
    )
