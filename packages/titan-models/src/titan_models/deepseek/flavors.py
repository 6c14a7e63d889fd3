"""Flavors of DeepSeek: the released sizes, and two small ones for development. Each call returns a new config.

Initial weights are distributed as in torchtitan 0.3.0 (see docs/concepts/initial_weights.md).
"""

from __future__ import annotations

import copy

from titan_models.attention.latent_attention import MultiHeadLatentAttention
from titan_models.block import Block
from titan_models.deepseek.model import DeepSeek
from titan_models.initialization.initializers import DepthScaledNormal, FanInNormal, Normal
from titan_models.layers.embedding import Embedding
from titan_models.layers.linear import Linear, residual_linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.rope import Rope
from titan_models.layers.swiglu import SwiGLU
from titan_models.layers.yarn import Yarn
from titan_models.moe import BalancingBias, ExpertGroups, MoE, SwiGLUExperts, TopKRouter


def deepseek_debug() -> DeepSeek.Config:
    """A V2 of 33 million parameters, 8 experts, with a vocabulary of 2048, for a laptop."""
    return _deepseek(
        vocab_size=2048,
        dim=256,
        num_layers=6,
        attention=_attention(num_heads=16),
        hidden_dim=1024,
        expert_dim=256,
        num_shared=2,
        router=TopKRouter.Config(num_experts=8, top_k=3),
        mscale=0.707,
    )


def deepseek_v3_debug() -> DeepSeek.Config:
    """A V3 of 8 million parameters, 8 experts in 4 groups, with a vocabulary of 2048, for a laptop."""
    return _deepseek(
        vocab_size=2048,
        dim=256,
        num_layers=4,
        attention=MultiHeadLatentAttention.Config(
            num_heads=8, head_dim=32, rotated_head_dim=16, value_head_dim=32, kv_rank=64, q_rank=96
        ),
        hidden_dim=768,
        expert_dim=256,
        num_shared=1,
        router=TopKRouter.Config(
            num_experts=8,
            top_k=2,
            score="sigmoid",
            groups=ExpertGroups.Config(num_groups=4, num_kept=2, score="sum of best two"),
            renormalize=True,
            scale=2.5,
            balancing=BalancingBias.Config(rate=0.01),  # for runs of a few dozen steps
        ),
    )


def deepseek_v2_lite_16b() -> DeepSeek.Config:
    """DeepSeek-V2-Lite: 64 experts, 6 and two shared ones per token."""
    return _deepseek(
        dim=2048,
        num_layers=27,
        attention=_attention(num_heads=16),
        hidden_dim=10_944,
        expert_dim=1408,
        num_shared=2,
        router=TopKRouter.Config(num_experts=64, top_k=6),
        mscale=0.707,
    )


def deepseek_v2_236b() -> DeepSeek.Config:
    """DeepSeek-V2: 160 experts, 6 (from 3 of 8 groups) and two shared ones per token."""
    return _deepseek(
        dim=5120,
        num_layers=60,
        attention=_attention(num_heads=128, q_rank=1536),
        hidden_dim=12_288,
        expert_dim=1536,
        num_shared=2,
        router=TopKRouter.Config(
            num_experts=160,
            top_k=6,
            groups=ExpertGroups.Config(num_groups=8, num_kept=3, score="best"),
            scale=16.0,
        ),
    )


def deepseek_v3_671b() -> DeepSeek.Config:
    """DeepSeek-V3: 256 experts, 8 (from 4 of 8 groups) and one shared one per token."""
    return _deepseek(
        vocab_size=129_280,
        dim=7168,
        num_layers=61,
        attention=_attention(num_heads=128, q_rank=1536),
        num_dense=3,
        hidden_dim=18_432,
        expert_dim=2048,
        num_shared=1,
        router=TopKRouter.Config(
            num_experts=256,
            top_k=8,
            score="sigmoid",
            groups=ExpertGroups.Config(num_groups=8, num_kept=4, score="sum of best two"),
            renormalize=True,
            scale=2.5,
            balancing=BalancingBias.Config(),
        ),
    )


def _attention(*, num_heads: int, q_rank: int | None = None) -> MultiHeadLatentAttention.Config:
    return MultiHeadLatentAttention.Config(
        num_heads=num_heads, head_dim=128, rotated_head_dim=64, value_head_dim=128, kv_rank=512, q_rank=q_rank
    )


def _deepseek(
    *,
    vocab_size: int = 102_400,
    dim: int,
    num_layers: int,
    attention: MultiHeadLatentAttention.Config,
    num_dense: int = 1,
    hidden_dim: int,
    expert_dim: int,
    num_shared: int,
    router: TopKRouter.Config,
    mscale: float = 1.0,
) -> DeepSeek.Config:
    attention.output, attention.latent_norm = residual_linear(), RMSNorm.Config(eps=1e-6)
    router.weight_init = DepthScaledNormal.Config()
    experts = MoE.Config(
        router=router,
        experts=SwiGLUExperts.Config(
            hidden_dim=expert_dim, up_init=DepthScaledNormal.Config(), down_init=DepthScaledNormal.Config()
        ),
        shared=SwiGLU.Config(hidden_dim=num_shared * expert_dim, up=residual_linear(), down=residual_linear()),
    )
    block = Block.Config(attention=attention, feed_forward=experts, norm=RMSNorm.Config(eps=1e-6))
    dense = copy.deepcopy(block)
    dense.feed_forward = SwiGLU.Config(hidden_dim=hidden_dim, up=residual_linear(), down=residual_linear())
    scaling = Yarn.Config(factor=40.0, mscale=mscale, mscale_all_dim=mscale)
    return DeepSeek.Config(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        block=block,
        layer_overrides={f"0:{num_dense}": dense},
        rope=Rope.Config(dim=attention.rotated_head_dim, theta=10_000.0, scaling=scaling),
        norm=RMSNorm.Config(eps=1e-6),
        embedding=Embedding.Config(weight_init=Normal.Config(std=1.0)),
        head=Linear.Config(weight_init=FanInNormal.Config()),
    )
