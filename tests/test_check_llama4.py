"""Llama 4 passes the public check on every kind of mesh: chunks, layers that do not rotate, experts' inputs weighed."""

from __future__ import annotations

import pytest
from titan_models import llama4
from titan_parallel import check_parallel
from titan_parallel.check import meshes
from torch import nn

SOME = ("fsdp2", "tp2_sp", "cp2_ring", "pp2")
OTHERS = ("ddp2", "tp2", "cp2_gather", "cp2_ulysses", "pp2_zbvzerobubble", "fsdp2_tp2_sp", "cp2_tp2_sp", "fsdp2_pp2")


def small_llama4() -> nn.Module:
    """Four kinds of blocks; chunks and steps of 4, shorter than the rows of the check; experts that no ranks divide."""
    config = llama4.llama4_debug()
    config.dim, config.num_layers, config.vocab_size, config.rope.dim = 32, 4, 64, 8
    config.block.feed_forward.hidden_dim = 48
    for block in (config.block, *config.layer_overrides.values()):
        block.attention.num_heads, block.attention.num_kv_heads, block.attention.head_dim = 4, 2, 8
    for numbers in ("1::4", "3::4"):
        moe = config.layer_overrides[numbers].feed_forward
        moe.router.num_experts, moe.experts.hidden_dim, moe.shared.hidden_dim = 3, 24, 24
    for block in (config.block, config.layer_overrides["1::4"]):
        block.attention.mask_modifiers[0].size = 4
    config.layer_overrides["3::4"].attention.temperature.step = 4
    model = config.build()
    model.init_weights(0)
    return model


def test_llama_4_is_the_same_on_two_ranks():
    report = check_parallel(small_llama4, meshes(*SOME), steps=1)
    assert report.ok, report


@pytest.mark.full
def test_llama_4_is_the_same_on_other_meshes():
    report = check_parallel(small_llama4, meshes(*OTHERS))
    assert report.ok, report
