"""titan's Llama 3 passes the public check on every kind of mesh."""

from __future__ import annotations

import pytest
import torch
from titan_models import llama3
from titan_parallel import (
    FullActivationCheckpoint,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
    check_parallel,
)
from titan_parallel.check import meshes
from torch import nn

TWO_RANKS = ("fsdp2", "ddp2", "tp2", "tp2_sp", "cp2_gather", "cp2_ulysses", "cp2_ring", "pp2", "pp2_zbvzerobubble")
FOUR_RANKS = (
    "fsdp4",
    "ddp2_fsdp2",
    "fsdp2_tp2_sp",
    "cp4_ring",
    "cp2_tp2_sp",
    "pp2_tp2_sp",
    "fsdp2_pp2_interleaved1f1b",
)
RECOMPUTATIONS = {
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
    "every_2nd": PeriodicActivationCheckpoint.Config(n=2),
}


def small_llama() -> nn.Module:
    config = llama3.llama3_debug()
    config.dim, config.num_layers, config.vocab_size, config.rope.dim = 32, 4, 64, 8
    attention = config.block.attention
    attention.num_heads, attention.num_kv_heads, attention.head_dim = 4, 2, 8
    config.block.feed_forward.hidden_dim = 48
    model = config.build()
    model.init_weights(0)
    return model


def test_llama_3_is_the_same_on_two_and_four_ranks():
    report = check_parallel(small_llama, meshes(*TWO_RANKS, *FOUR_RANKS), steps=1)
    assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_llama_3_is_the_same_with_recomputation(recomputation, dtype):
    options = {"activation_checkpoint": RECOMPUTATIONS[recomputation], "dtype": dtype}
    report = check_parallel(small_llama, meshes(*TWO_RANKS, *FOUR_RANKS), **options)
    assert report.ok, report


def test_weights_that_were_never_drawn_are_refused():
    with pytest.raises(ValueError, match="must return finite weights"):
        check_parallel(llama3.llama3_debug().build, meshes("fsdp2"))
