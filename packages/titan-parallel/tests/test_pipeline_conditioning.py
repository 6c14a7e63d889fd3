"""Conditioning: values computed before the blocks and read by every block, on every stage of a pipeline.

B batch, T tokens, D width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import ParallelDims, check_parallel, parallelize, per_token
from titan_parallel.pipeline_parallel import partition as stages
from titan_parallel.pipeline_parallel import tied_weights as shared_weights
from titan_parallel.probe.stage_run import StageRun
from titan_parallel.probe.verdict import Verdict
from torch import nn
from torch.nn import functional as F

WIDTH, TOKENS, VOCABULARY = 16, 8, 24


class Time(nn.Module):
    """A time to a vector, through frequencies that are a buffer; one of its weights is frozen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.5, 3, 4))
        self.up, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up.weight.requires_grad_(False)

    def forward(self, time):
        angles = time[:, None] * self.frequencies
        return self.out(F.silu(self.up(torch.cat([angles.sin(), angles.cos()], -1))))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    """Modulated by the time, and mixing tokens with a bias that all blocks share."""

    def __init__(self):
        super().__init__()
        self.norm, self.modulation, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), FeedForward()

    def forward(self, x, time, bias=None, memory=None):
        scale, shift = self.modulation(F.silu(time)).unsqueeze(1).chunk(2, -1)
        x = x + self.mix(self.norm(x) * (1 + scale) + shift)
        if bias is not None:
            x = x + bias.softmax(-1) @ x
        return x if memory is None else x + memory.mean(1, keepdim=True)


class Model(nn.Module):
    """A conditioned stack, in several ways: see the functions below."""

    def __init__(self, layers=4, tied=False):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.time = Time()
        self.bias = nn.Parameter(torch.randn(TOKENS, TOKENS))
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.start = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.words.weight

    def enter(self, tokens):
        return self.start(self.words(tokens) + self.places.weight[: tokens.shape[1]])

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))


class ByKeywords(Model):
    """Passes conditioning by keyword and hidden states not first; all blocks read a learned table."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        for block in self.blocks:
            x = block(time=condition, bias=self.bias, x=x)
        return self.head(self.norm(x))


class AfterAndBetween(Model):
    """Conditioning between blocks and after them, and a norm after the blocks that is defined before them."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        for block in self.blocks:
            x = block(x, condition) * 1.5 + condition[:, None]
        return self.head(self.start(self.norm(x) * (1 + condition[:, None])))


class Encoded(Model):
    """Every block reads the output of an encoder of other tokens, whose embedding has no role."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        memory = self.encoder(self.places(tokens % TOKENS))
        for block in self.blocks:
            x = block(x, condition, memory=memory)
        return self.head(self.norm(x))


class WordsCondition(Model):
    """Passes word embeddings to every block besides the hidden states."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time) + self.words(tokens).mean(1)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))


class DetachedWords(Model):
    """Passes word embeddings to blocks detached and written in place."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        table = torch.zeros_like(condition)
        with torch.no_grad():
            table[:, :4] += self.words(tokens).mean(1)[:, :4]
        for block in self.blocks:
            x = block(x, condition + table)
        return self.head(self.norm(x))


@dataclass
class Places:
    time: torch.Tensor
    words: tuple


class WordsInAPlace(Model):
    """Passes word embeddings to blocks nested in an object."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        for block in self.blocks:
            x = block(x, condition, memory=Places(condition, ({"words": self.words(tokens)},)))
        return self.head(self.norm(x))


class WordsAtTheEnd(Model):
    """Computes logits with the weight of the word embedding, without a head."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        for block in self.blocks:
            x = block(x, condition)
        return F.linear(self.norm(x), self.words.weight)


class SkipsABlock(Model):
    """A long skip connection: the last block reads the output of the first."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        first = x = self.blocks[0](x, condition)
        for block in self.blocks[1:-1]:
            x = block(x, condition)
        return self.head(self.norm(self.blocks[-1](x + first, condition)))


class ResidualOutside(Model):
    """Adds a residual connection around the blocks."""

    def forward(self, tokens, time):
        x, condition = self.enter(tokens), self.time(time)
        for block in self.blocks:
            x = x + block(x, condition)
        return self.head(self.norm(x))


class SumOfLayers(Model):
    """Reads the outputs of all blocks after the last block."""

    def forward(self, tokens, time):
        x, condition, made = self.enter(tokens), self.time(time), []
        for block in self.blocks:
            made.append(x := block(x, condition))
        return self.head(self.norm(sum(made)))


ROLES = {
    "words": "embedding",
    "blocks.*": "block",
    "blocks.*.mix": "region",
    "blocks.*.mix.up": "colwise",
    "blocks.*.mix.down": "rowwise",
    "head": "head",
}
NO_ROLE = {name: role for name, role in ROLES.items() if name != "words"}
NO_HEAD = {name: role for name, role in NO_ROLE.items() if name != "head"}


def make_batch(rows=8):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (rows, TOKENS), generator=generator)
    return SimpleNamespace(
        inputs={"tokens": tokens, "time": torch.rand(rows, generator=generator, dtype=torch.float64)},
        targets={"labels": tokens.roll(-1, 1)},
        sequence_dims={"tokens": 1, "labels": 1},
    )


def pipeline(schedule="1F1B", **degrees):
    return ParallelDims.Config(pipeline_parallel_degree=2, pipeline_parallel_schedule=schedule, **degrees)


TWO_RANKS = {
    "pp2": pipeline(),
    "interleaved": pipeline("Interleaved1F1B"),
    "V": pipeline("ZBVZeroBubble"),
    "zero bubble": pipeline("InterleavedZeroBubble"),
}
FOUR_RANKS = {
    "pp2 x fsdp2": pipeline(),
    "pp2 x tp2": pipeline(tensor_parallel_degree=2, sequence_parallel=False),
    "pp2 x tp2, sequence parallel": pipeline("Interleaved1F1B", tensor_parallel_degree=2),
    "pp4": ParallelDims.Config(pipeline_parallel_degree=4),
}


def check(kind, parallelism, roles=ROLES, world_size=2, **options):
    return check_parallel(
        kind,
        parallelism,
        roles=roles,
        batch=make_batch(),
        num_microbatches=4,
        world_size=world_size,
        steps=2,
        **options,
    )


@pytest.mark.parametrize("kind", [Model, ByKeywords, AfterAndBetween, Encoded])
def test_every_stage_has_what_every_block_reads(kind):
    report = check(kind, TWO_RANKS)
    assert report.ok, report


@pytest.mark.parametrize("kind", [AfterAndBetween, pytest.param(ByKeywords, marks=pytest.mark.full)])
def test_conditioning_with_other_axes(kind):
    report = check(kind, FOUR_RANKS, world_size=4)
    assert report.ok, report


def test_embeddings_that_are_needed_elsewhere_are_held_by_all_without_the_role():
    assert (report := check(lambda: Model(tied=True), TWO_RANKS)).ok, report
    for kind, roles in (
        (lambda: WordsCondition(tied=True), NO_ROLE),
        (DetachedWords, NO_ROLE),
        (WordsAtTheEnd, NO_HEAD),
    ):
        assert (report := check(kind, {"V": pipeline("ZBVZeroBubble")}, roles)).ok, report


BESIDE_THE_STREAM = [
    (
        WordsCondition,
        "must enter the first block only, as hidden states, got the output of words in argument 1 of",
    ),
    (WordsInAPlace, "got the output of words in memory of blocks.0"),
    (DetachedWords, "got the output of words in argument 1 of blocks.0"),
    (WordsAtTheEnd, "must be read by that module only, got a model that reads words.weight elsewhere"),
    (SkipsABlock, "must exchange hidden states only, got an output of blocks.0 in the hidden states of blocks.3"),
    (ResidualOutside, "got the output of words in the hidden states of blocks.1"),
    (SumOfLayers, "must exchange hidden states only, got an output of blocks.0 after the blocks"),
]


def test_values_that_stages_do_not_exchange_raise_on_every_rank(run_ranks):
    def run():
        dims = pipeline().build(world_size=2, device_type="cpu")
        for kind, message in BESIDE_THE_STREAM:
            roles = {name: role for name, role in ROLES.items() if kind is not WordsAtTheEnd or name != "head"}
            parallel = parallelize(kind().double(), roles, dims)
            with pytest.raises(ConfigError, match=message):
                parallel.forward_backward([make_batch()] * 2, loss, 1)
            with pytest.raises(ConfigError, match=message):
                parallel.evaluate([make_batch()], loss)

    run_ranks(2, run)


@per_token
def loss(head, hidden, targets):
    logits = head(hidden)
    return F.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten(), reduction="sum"), torch.tensor(64)


def give_zeros_for_all_that_is_before_the_blocks(patch):
    of = stages.StageModules.of.__func__

    def wrong(cls, model, roles, degree):
        pieces = of(cls, model, roles, degree)
        pieces.embeddings["time"] = model.time
        return pieces

    patch.setattr(stages.StageModules, "of", classmethod(wrong))
    patch.setattr(stages.StageProbe, "_error", lambda *_: AssertionError)
    patch.setattr("titan_parallel.pipeline_parallel.shape_probe.Followed.labels_of", lambda self, value: set())
    return "time.out|blocks.2.modulation"


def forget_the_gradients_of_other_stages(patch):
    patch.setattr(shared_weights, "_sum_over_all", lambda *_: None)
    return "time.out.weight"


def count_them_in_the_norm_of_every_rank(patch):
    patch.setattr(stages.Stages, "duplicate_parameters", [])
    return "gradient norm of step 1"


@pytest.mark.parametrize(
    "sabotage",
    [
        give_zeros_for_all_that_is_before_the_blocks,
        forget_the_gradients_of_other_stages,
        count_them_in_the_norm_of_every_rank,
    ],
)
def test_lost_conditioning_is_detected(monkeypatch, sabotage):
    found = sabotage(monkeypatch)
    monkeypatch.setattr(StageRun, "verdict", lambda self: Verdict(True))  # the probe refuses some of it before
    report = check(Model, {"pp2": pipeline()})
    names = [finding.name for finding in report.meshes["pp2"].findings]
    assert any(re.search(found, name) for name in names), report
