"""GPT-OSS passes the public check on every kind of mesh: sinks, windows, biases, experts."""

from __future__ import annotations

import pytest
from titan_models import gpt_oss
from titan_parallel import check_parallel
from titan_parallel.check import meshes
from torch import nn

SOME = ("fsdp2", "tp2_sp", "cp2_ring", "pp2")
OTHERS = ("ddp2", "tp2", "cp2_gather", "cp2_ulysses", "pp2_zbvzerobubble", "fsdp2_tp2_sp", "cp2_tp2_sp", "fsdp2_pp2")


def small_gpt_oss() -> nn.Module:
    """Blocks of both kinds; windows of 3, shorter than the rows of the check, and clamps that small weights reach."""
    config = gpt_oss.gpt_oss_debug()
    config.dim, config.vocab_size, config.rope.dim = 32, 64, 8
    for block in (config.block, *config.layer_overrides.values()):
        block.attention.num_heads, block.attention.num_kv_heads, block.attention.head_dim = 4, 2, 8
        block.feed_forward.experts.hidden_dim, block.feed_forward.experts.gating.limit = 24, 0.05
    config.block.attention.mask_modifiers[0].size = 3
    model = config.build()
    model.init_weights(0)
    return model


def test_gpt_oss_is_the_same_on_two_ranks():
    report = check_parallel(small_gpt_oss, meshes(*SOME), steps=1)
    assert report.ok, report


@pytest.mark.full
def test_gpt_oss_is_the_same_on_other_meshes():
    report = check_parallel(small_gpt_oss, meshes(*OTHERS))
    assert report.ok, report


@pytest.mark.parametrize("lost", ["sinks", "bias"])
def test_what_a_rank_does_to_all_heads_or_once_too_often_is_noticed(monkeypatch, lost):
    """A tensor rank that keeps the sinks of the first heads; a bias that every rank adds to the sum of all."""
    from titan_parallel.tensor_parallel.apply import TensorParallel

    split, find = TensorParallel._split_dims, TensorParallel._find_slices

    def of_the_first_heads(self):
        return {slot: dim for slot, dim in split(self).items() if slot[1] != "sinks"}

    def takes(self):
        found = {slot: take for slot, take in find(self).items() if lost == "sinks" or slot[1] != "bias"}
        heads = [self._model.get_submodule(name.removesuffix(".sinks")) for name in self._roles.named("per_head")]
        return found | ({(module, "sinks"): lambda sinks: sinks[:2] for module in heads} if lost == "sinks" else {})

    monkeypatch.setattr(TensorParallel, "_split_dims", of_the_first_heads if lost == "sinks" else split)
    monkeypatch.setattr(TensorParallel, "_find_slices", takes)
    report = check_parallel(small_gpt_oss, meshes("tp2_sp"), steps=1)
    assert lost in str(report) and not report.ok
