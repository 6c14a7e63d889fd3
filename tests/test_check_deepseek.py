"""titan's DeepSeek is the same on every kind of mesh: latent attention, shared experts, groups and a balancing bias."""

from __future__ import annotations

import pytest
from titan_models import deepseek
from titan_parallel import Compile, SelectiveRecompute, check_parallel
from titan_parallel.check import meshes
from torch import nn

FEW = ("fsdp2", "tp2_sp", "cp2_ulysses", "pp2")
MANY = ("ddp2", "tp2", "cp2", "cp2_ring", "fsdp2_tp2", "fsdp2_tp2_sp", "cp2_tp2_sp", "pp2_tp2_sp", "fsdp2_pp2")


def small_v3() -> nn.Module:
    config = deepseek.deepseek_v3_debug()
    config.dim, config.num_layers, config.vocab_size, config.rope.dim = 32, 3, 64, 6
    for block in (config.block, *config.exceptions.values()):
        attention = block.attention
        attention.num_heads, attention.kv_rank, attention.q_rank = 4, 12, 20
        attention.head_dim, attention.rotated_head_dim, attention.value_head_dim = 10, 6, 8
    config.exceptions["0:1"].feed_forward.hidden_dim = 48
    config.block.feed_forward.experts.hidden_dim = config.block.feed_forward.shared.hidden_dim = 16
    model = config.build()
    model.init_weights(0)
    return model


def test_deepseek_is_the_same_on_two_ranks() -> None:
    check_parallel(small_v3, meshes(*FEW), steps=1).raise_for_failure()


@pytest.mark.full
def test_deepseek_is_the_same_on_two_and_four_ranks() -> None:
    check_parallel(small_v3, meshes(*FEW, *MANY)).raise_for_failure()
