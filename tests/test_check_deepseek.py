"""titan's DeepSeek is the same on every kind of mesh: latent attention, shared experts, groups and a balancing bias."""

from __future__ import annotations

import functools

import pytest
import torch
from titan_data import Batch, with_mtp_targets
from titan_models import deepseek
from titan_parallel import Compile, FullActivationCheckpoint, SelectiveActivationCheckpoint, check_parallel
from titan_parallel.check import meshes
from titan_trainer import MultiTokenPredictionLoss
from torch import nn

FEW = ("fsdp2", "tp2_sp", "cp2_ulysses", "pp2")
MANY = ("ddp2", "tp2", "cp2", "cp2_ring", "fsdp2_tp2", "fsdp2_tp2_sp", "cp2_tp2_sp", "pp2_tp2_sp", "fsdp2_pp2")


def small_v3(mtp: bool = False) -> nn.Module:
    config = deepseek.deepseek_v3_debug()
    config.dim, config.num_layers, config.vocab_size, config.rope.dim = 32, 3, 64, 6
    for block in (config.block, *config.layer_overrides.values()):
        attention = block.attention
        attention.num_heads, attention.kv_rank, attention.q_rank = 4, 12, 20
        attention.head_dim, attention.rotated_head_dim, attention.value_head_dim = 10, 6, 8
    config.layer_overrides["0:1"].feed_forward.hidden_dim = 48
    config.block.feed_forward.experts.hidden_dim = config.block.feed_forward.shared.hidden_dim = 16
    config.mtp = mtp
    model = config.build()
    model.init_weights(0)
    return model


def test_deepseek_is_the_same_on_two_ranks() -> None:
    check_parallel(small_v3, meshes(*FEW), steps=1).raise_for_failure()


@pytest.mark.full
def test_deepseek_is_the_same_on_two_and_four_ranks() -> None:
    check_parallel(small_v3, meshes(*FEW, *MANY)).raise_for_failure()


def batch_with_mtp_targets(rows: int = 8, tokens: int = 16) -> Batch:
    """Each row holds two documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (rows, tokens + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, tokens // 2 - 1] = -100
    positions = (torch.arange(tokens) % (tokens // 2)).expand(rows, tokens)
    documents = (torch.arange(tokens) // (tokens // 2)).expand(rows, tokens)
    inputs = {"tokens": ids[:, :-1], "positions": positions, "document_ids": documents}
    return with_mtp_targets(Batch(inputs, {"labels": labels}, dict.fromkeys([*inputs, "labels"], 1), [[]] * rows))


def check_looking_ahead(*names: str, **options) -> None:
    build, loss = functools.partial(small_v3, mtp=True), MultiTokenPredictionLoss.Config().build()
    report = check_parallel(build, meshes(*names), batch=batch_with_mtp_targets(), loss=loss, **options)
    report.raise_for_failure()


def test_looking_ahead_is_the_same_on_two_ranks() -> None:
    check_looking_ahead(*FEW, steps=1)


@pytest.mark.full
def test_looking_ahead_is_the_same_on_two_and_four_ranks() -> None:
    check_looking_ahead(*FEW, *MANY)


@pytest.mark.full
@pytest.mark.parametrize(
    ("recompute", "compile"),
    [
        (SelectiveActivationCheckpoint.Config(), None),
        (FullActivationCheckpoint.Config(), None),
        (FullActivationCheckpoint.Config(), Compile.Config(backend="aot_eager")),
    ],
    ids=["selective", "full", "full and compiled"],
)
def test_looking_ahead_is_the_same_with_recomputation(recompute, compile) -> None:
    check_looking_ahead("fsdp2", "tp2_sp", "pp2", steps=1, activation_checkpoint=recompute, compile=compile)


@pytest.mark.full
def test_tokens_shifted_after_the_split_are_noticed() -> None:
    """Each context rank then takes the first token of its own for the one that follows its last."""
    build = functools.partial(small_v3, mtp=True)
    assert not check_parallel(build, meshes("cp2"), batch=batch_with_mtp_targets(), loss=ShiftsItself(), steps=1).ok


class ShiftsItself(MultiTokenPredictionLoss):
    """Makes the second labels of what labels a rank has."""

    def __init__(self) -> None:
        MultiTokenPredictionLoss.__init__(self, MultiTokenPredictionLoss.Config())

    def __call__(self, head, hidden, targets):
        return super().__call__(head, hidden, targets | {"next_labels": targets["labels"].roll(-1, 1)})
