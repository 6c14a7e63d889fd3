"""Flavors of GPT-OSS: the released sizes, and a small one for development. Each call returns a new config.

Initial weights are distributed as in torchtitan 0.3.0 (see docs/concepts/initial_weights.md).
"""

from __future__ import annotations

from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.mask import MaskModifier, SlidingWindow
from titan_models.block import Block
from titan_models.gpt_oss.model import GptOss
from titan_models.initialization.initializers import Constant, DepthScaledNormal, FanInNormal
from titan_models.layers.linear import Linear
from titan_models.layers.rope import Rope
from titan_models.layers.yarn import Yarn
from titan_models.moe import ClampedGating, MoE, SwiGLUExperts, TopKRouter


def gpt_oss_debug() -> GptOss.Config:
    """81 million parameters, 8 experts, 4 per token, with a vocabulary of 2048, for a laptop."""
    return _gpt_oss(vocab_size=2048, dim=256, num_layers=4, num_experts=8)


def gpt_oss_20b() -> GptOss.Config:
    """GPT-OSS 20B: 32 experts, 4 per token, 3.6 billion active parameters."""
    return _gpt_oss(num_layers=24, num_experts=32)


def gpt_oss_120b() -> GptOss.Config:
    """GPT-OSS 120B: 128 experts, 4 per token, 5.1 billion active parameters."""
    return _gpt_oss(num_layers=36, num_experts=128)


def _gpt_oss(*, vocab_size: int = 201_088, dim: int = 2880, num_layers: int, num_experts: int) -> GptOss.Config:
    return GptOss.Config(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        block=_block(num_experts, mask_modifiers=[SlidingWindow.Config(size=128)]),
        layer_overrides={"1::2": _block(num_experts, mask_modifiers=[])},
        rope=Rope.Config(dim=64, theta=150_000.0, scaling=Yarn.Config(factor=32.0, truncate=False)),
        head=Linear.Config(weight_init=FanInNormal.Config()),
    )


def _block(num_experts: int, mask_modifiers: list[MaskModifier.Config]) -> Block.Config:
    def zeros() -> Constant.Config:
        return Constant.Config(value=0.0)

    def linear() -> Linear.Config:
        return Linear.Config(weight_init=DepthScaledNormal.Config(), bias_init=zeros())

    return Block.Config(
        attention=GroupedQueryAttention.Config(
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            mask_modifiers=mask_modifiers,
            input=linear(),
            output=linear(),
            sink_init=DepthScaledNormal.Config(),
        ),
        feed_forward=MoE.Config(
            router=TopKRouter.Config(
                num_experts=num_experts,
                top_k=4,
                renormalize=True,
                weight_init=DepthScaledNormal.Config(),
                bias_init=zeros(),
            ),
            experts=SwiGLUExperts.Config(
                hidden_dim=2880,
                gating=ClampedGating.Config(),
                gate_init=DepthScaledNormal.Config(),
                up_init=DepthScaledNormal.Config(),
                down_init=DepthScaledNormal.Config(),
                bias_init=DepthScaledNormal.Config(),
            ),
        ),
    )
