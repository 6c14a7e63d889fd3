"""Balancing of experts counts the whole global batch once, on any mesh and whatever is recomputed or accumulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from titan_models import Decoder, SwiGLU
from titan_models.moe import BalancingBias, ExpertGroups, MoE, SwiGLUExperts, TopKRouter
from titan_models.qwen3 import qwen3_moe_debug
from titan_parallel import Compile, EveryNthBlock, FullRecompute, SelectiveRecompute, check_parallel
from titan_parallel.check import meshes

TWO_RANKS = ("fsdp2", "ddp2", "tp2", "tp2_sp", "cp2_gather", "cp2_ulysses", "cp2_ring", "pp2")
ZERO_BUBBLE = ("pp2_zbvzerobubble", "pp2_interleavedzerobubble")
FOUR_RANKS = ("fsdp4", "ddp2_fsdp2", "fsdp2_tp2_sp", "cp2_tp2_sp", "pp2_tp2_sp", "fsdp2_pp2_interleaved1f1b")


def balanced_moe(**router: Any) -> MoE.Config:
    """Sigmoid, groups, a bias and a shared expert, as DeepSeek-V3 has them."""
    options: dict[str, Any] = {
        "num_experts": 8,
        "top_k": 3,
        "score": "sigmoid",
        "renormalise": True,
        "scale": 2.5,
        "groups": ExpertGroups.Config(num_groups=4, num_kept=2, score="sum of best two"),
        "balancing": BalancingBias.Config(rate=0.02),
    }
    return MoE.Config(
        router=TopKRouter.Config(**{**options, **router}),
        experts=SwiGLUExperts.Config(hidden_dim=16),
        shared=SwiGLU.Config(hidden_dim=16),
    )


def small(moe: MoE.Config | None = None) -> Decoder.Config:
    config = qwen3_moe_debug()
    config.dim, config.num_layers, config.vocab_size, config.rope.dim = 32, 4, 64, 8
    attention = config.block.attention
    attention.num_heads, attention.num_kv_heads, attention.head_dim = 4, 2, 8
    config.block.feed_forward.experts.hidden_dim = 16
    if moe is not None:
        config.block.feed_forward = moe
    return config


def build_of(config: Decoder.Config) -> Callable[[], Decoder]:
    def build() -> Decoder:
        model = config.build()
        model.init_weights(0)
        return model

    return build


@pytest.mark.parametrize(
    "names",
    [
        (*TWO_RANKS[:1], "tp2_sp", "cp2_ulysses", "pp2", ZERO_BUBBLE[0]),
        pytest.param((*TWO_RANKS, *ZERO_BUBBLE, *FOUR_RANKS), marks=pytest.mark.full),
    ],
    ids=["few", "all"],
)
def test_the_bias_is_the_same_on_any_mesh(names: tuple[str, ...]) -> None:
    report = check_parallel(build_of(small(balanced_moe())), meshes(*names), steps=3)
    assert report.ok, report
    print(report)
