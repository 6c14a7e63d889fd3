"""Probes of a pipeline model before its first step: no side effects, no hang, clear errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import ParallelDims, check_parallel, parallelize, per_token
from titan_parallel.pipeline_parallel.stage_forward import StageForward, StageModel
from titan_parallel.pipeline_parallel.stage_modules import StageModules
from titan_parallel.probe.model_probe import ModelProbe
from titan_parallel.probe.stage_run import StageCut, StageRun
from titan_parallel.probe.verdict import Verdict
from titan_parallel.sharding_plan.roles import Roles
from torch import nn

WIDTH, TOKENS, VOCABULARY = 8, 6, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.mix(self.norm(x)))


class Model(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.start = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def enter(self, tokens):
        return self.start(self.words(tokens))

    def leave(self, x):
        return self.head(self.norm(x))

    def forward(self, tokens):
        x = self.enter(tokens)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


ROLES = {"words": "embedding", "blocks.*": "block", "head": "head"}


def make_batch(rows=2, tokens=TOKENS):
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        inputs={"tokens": ids}, targets={"labels": ids.roll(-1, 1)}, sequence_dims={"tokens": 1, "labels": 1}
    )


@per_token
def loss(head, hidden, targets):
    logits, labels = head(hidden), targets["labels"].flatten()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"), torch.tensor(len(labels))


def put_on_two_ranks(model, roles=ROLES, **degrees):
    degree = degrees.setdefault("pipeline_parallel_degree", 2)
    dims = ParallelDims.Config(**degrees).build(world_size=degree, device_type="cpu")
    return parallelize(model.double(), roles, dims)


def test_the_probe_does_not_change_buffers_or_random_state(run_ranks):
    class Counting(Model):
        def __init__(self):
            super().__init__()
            self.start = nn.BatchNorm1d(TOKENS)
            self.register_buffer("calls", torch.tensor(0))

        def enter(self, tokens):
            self.calls = self.calls + 1
            return super().enter(tokens) + 0 * torch.rand(())

    def run():
        parallel = put_on_two_ranks(Counting())
        states = []
        for _ in range(2):  # the first one probes
            torch.manual_seed(0)
            parallel.forward_backward([make_batch()] * 2, loss, 1)
            states.append(torch.get_rng_state())
        model = parallel.model
        return torch.equal(*states), int(model.start.num_batches_tracked), int(model.calls)

    assert run_ranks(2, run) == [(True, 4, 4)] * 2


def test_a_new_batch_shape_on_one_data_rank_is_probed_by_all(run_ranks):
    def run():
        torch.manual_seed(0)
        model = Model()
        dims = ParallelDims.Config(pipeline_parallel_degree=2, data_parallel_shard_degree=2).build(
            world_size=4, device_type="cpu"
        )
        parallel = parallelize(model.double(), ROLES, dims)
        tokens = [(6, 6), (6, 4), (3, 6)]
        return [
            float(parallel.forward_backward([make_batch(tokens=number[dims.dp_rank])] * 2, loss, 1))
            for number in tokens
        ]

    torch.manual_seed(0)
    model = Model().double()
    expected = {
        number: 2 * loss(lambda x: x, model(batch.inputs["tokens"]), batch.targets)[0].item()
        for number in (3, 4, 6)
        for batch in [make_batch(tokens=number)]
    }
    for found in run_ranks(4, run):
        assert found == pytest.approx([expected[a] + expected[b] for a, b in ((6, 6), (6, 4), (3, 6))])


class FailsHere(Model):
    """Raises on the last stage of one data rank."""

    def leave(self, x):
        if torch.distributed.get_rank() == 3:
            raise KeyError("nothing of that name")
        return super().leave(x)


def test_an_error_on_one_rank_is_raised_on_all(run_ranks):
    def run():
        dims = ParallelDims.Config(pipeline_parallel_degree=2, data_parallel_shard_degree=2).build(
            world_size=4, device_type="cpu"
        )
        parallel = parallelize(FailsHere().double(), {**ROLES, "head": ("head", {"takes_loss": False})}, dims)
        with pytest.raises(ConfigError, match=r"must run without the blocks.*KeyError.*nothing of that name"):
            parallel.forward_backward([make_batch()] * 2, loss, 1)

    run_ranks(4, run)


class CallsANormOfABlock(Model):
    """Calls a norm of a block after the blocks. A stage that does not hold its weight would compute another norm."""

    def leave(self, x):
        return super().leave(self.blocks[0].norm(x))


class ReadsABlock(Model):
    def leave(self, x):
        return super().leave(x * self.blocks[0].norm.weight)


class Rescales(Model):
    """Like RWKV, rescales the weights of blocks in eval mode."""

    def forward(self, tokens):
        if not self.training:
            for block in self.blocks:
                block.mix.weight.data.mul_(1)
        return super().forward(tokens)


class NoTensor(Model):
    """Calls a position embedding with an integer."""

    def __init__(self):
        super().__init__()
        self.places = Places()

    def enter(self, tokens):
        return super().enter(tokens) + self.places(tokens.shape[1])


class Places(nn.Embedding):
    def __init__(self):
        super().__init__(TOKENS, WIDTH)

    def forward(self, count):
        return self.weight[:count]


class SharedWithABlock(Model):
    """Shares a weight of a block with a module outside the blocks."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.start.weight = self.blocks[1].mix.weight


class ListAfterTheBlocks(Model):
    """Has an embedding for each block, defined after the blocks."""

    def __init__(self):
        super().__init__()
        self.between = nn.ModuleList(nn.Embedding(VOCABULARY, WIDTH) for _ in self.blocks)

    def forward(self, tokens):
        x = self.enter(tokens)
        for embedding, block in zip(self.between, self.blocks, strict=True):
            x = block(x + embedding(tokens))
        return self.leave(x)


class IndexedAfterTheBlocks(ListAfterTheBlocks):
    def forward(self, tokens):
        x = self.enter(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x + self.between[index](tokens))
        return self.leave(x)


class Leaves(Block):
    """In training, adds to its output what the first block stored in a dict."""

    def forward(self, x, seen):
        return super().forward(x) + (seen.setdefault("first", x) if self.training or "number" in seen else 0)


class SharesADict(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Leaves() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x, seen = self.enter(tokens), {}
        for block in self.blocks:
            x = block(x, seen)
        return self.leave(x)


class KeepsAnAttribute(Model):
    """Each block reads an attribute of the previous block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Keeps() for _ in range(4))
        for block, before in zip(self.blocks[1:], self.blocks, strict=False):
            block.before = [before]  # no child of the block
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)


class Keeps(Block):
    def __init__(self):
        super().__init__()
        self.before, self.last = [], None

    def forward(self, x):
        self.last = x
        return super().forward(x) + sum(block.last for block in self.before if block.last is not None)


class ForgetsFirst(KeepsAnAttribute):
    """Resets the attributes of the blocks at the start of each forward."""

    def forward(self, tokens):
        for block in self.blocks:
            block.last = None
        return super().forward(tokens)


class SharesAFullDict(SharesADict):
    def forward(self, tokens):
        x, seen = self.enter(tokens), {"number": 1}
        for block in self.blocks:
            x = block(x, seen)
        return self.leave(x)


class SharesAnObject(Model):
    """Blocks add to an object that is reset at the start of each forward."""

    def __init__(self):
        super().__init__()
        self.seen = SimpleNamespace(total=None)
        self.blocks = nn.ModuleList(Adds(self.seen) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        self.seen.total = torch.zeros(())
        return super().forward(tokens)


class Adds(Block):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.total = self.seen.total + x.square().mean()
        return super().forward(x) + self.seen.total.sin() * x


class InPlace(Block):
    def forward(self, x):
        x += torch.tanh(self.mix(self.norm(x)))
        return x


class AddsInPlace(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(InPlace() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)


class Deep(SharesAnObject):
    """Has more equivalent blocks than a probe runs."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adds(self.seen) for _ in range(32))


def test_blocks_at_the_ends_of_stages_are_always_compared():
    halves = [range(0, 16), range(16, 32)]
    for model, is_right in ((Deep(), False), (Model(32), True)):
        assert ModelProbe(model.double(), Roles(model, ROLES)).stages(StageCut(halves, [0, 1], 2)).proved is is_right


SHARED_BY_ALL = {}


class InAGlobal(Block):
    def __init__(self, is_first):
        super().__init__()
        self.is_first = is_first

    def forward(self, x):
        if self.is_first:
            SHARED_BY_ALL["first"] = x
        return super().forward(x) + SHARED_BY_ALL["first"]


class SharesAGlobal(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(InAGlobal(number == 0) for number in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)


class FailsAlone(KeepsAnAttribute):
    """Fails when the previous block has not run."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            del block.last


class NamesItsInputs(KeepsAnAttribute):
    """Has a second input that is unknown before the first batch."""

    def forward(self, tokens, scale):
        x = self.enter(tokens) * scale.mean()
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


EXCHANGES_MORE_THAN_HIDDEN_STATES = [
    KeepsAnAttribute,
    ForgetsFirst,
    SharesADict,
    SharesAFullDict,
    SharesAnObject,
    SharesAGlobal,
    FailsAlone,
]


@pytest.mark.parametrize("kind", EXCHANGES_MORE_THAN_HIDDEN_STATES)
def test_blocks_that_exchange_more_than_hidden_states_are_rejected(run_ranks, kind):
    message = r"got a stage that starts at blocks\.3, which (gives other values|fails without)"

    def run():
        parallel = put_on_two_ranks(kind())
        with pytest.raises(ConfigError, match=message):
            parallel.forward_backward([make_batch()] * 2, loss, 1)

    run_ranks(2, run)


def test_blocks_of_a_model_with_unknown_inputs_are_rejected_at_the_first_batch(run_ranks):
    def run():
        parallel = put_on_two_ranks(NamesItsInputs())
        batch = make_batch()
        batch.inputs["scale"] = torch.ones(2)
        with pytest.raises(ConfigError, match=r"got a stage that starts at blocks\.3, which gives other values"):
            parallel.forward_backward([batch] * 2, loss, 1)

    run_ranks(2, run)


class StoresForInspection(Model):
    """Blocks store outputs that no block reads, as many do for inspection."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(KeepsAlone() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)


class KeepsAlone(Block):
    def forward(self, x):
        self.last = x.detach()
        return super().forward(x)


class Noisy(Model):
    """Draws random numbers in eval mode too."""

    def enter(self, tokens):
        x = super().enter(tokens)
        return x + torch.rand(x.shape)


def test_blocks_that_add_in_place_pass():
    model = AddsInPlace().double()
    assert ModelProbe(model, Roles(model, ROLES)).stages(StageCut([range(0, 2), range(2, 4)], [0, 1], 2)) == Verdict(
        True
    )


class Anneals(Model):
    """Changes its state in each forward, before the blocks."""

    def __init__(self):
        super().__init__()
        self.start = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.register_buffer("step", torch.tensor(0))

    def enter(self, tokens):
        if self.training:
            self.step = self.step + 1
        return super().enter(tokens) * (1 + 1 / (1 + self.step))


class DropsPaths(Model):
    """Stochastic depth: some blocks are skipped at random in training."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Drops() for _ in range(8))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)


class Drops(Block):
    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.05 else super().forward(x)


@pytest.mark.parametrize("kind", [Anneals, DropsPaths])
def test_state_and_random_numbers_are_not_an_exchange(kind):
    for seed in range(10):
        torch.manual_seed(seed)
        model = kind().double()
        probe = ModelProbe(model, Roles(model, ROLES))
        number = len(model.blocks)
        assert probe.stages(StageCut([range(0, 2), range(2, number)], [0, 1], 2)) == Verdict(True)
        assert probe.context() == Verdict(True)


class DropsBlocks(Model):
    """LayerDrop: the loop skips a block in training."""

    skipped = 2

    def forward(self, tokens):
        x = self.enter(tokens)
        for number, block in enumerate(self.blocks):
            x = x if self.training and number == self.skipped else block(x)
        return self.leave(x)


def test_a_skipped_block_is_rejected_in_the_first_step(run_ranks):
    def run():
        parallel = put_on_two_ranks(DropsBlocks())
        with pytest.raises(ConfigError, match=r"got an output of blocks\.1 in the hidden states of blocks\.3"):
            parallel.forward_backward([make_batch()] * 2, loss, 1)

    run_ranks(2, run)


def test_a_stage_whose_input_is_not_used_raises_in_any_step():
    model, received = DropsBlocks(), torch.randn(2, TOKENS, WIDTH)
    matched = Roles(model, ROLES)
    parts = StageModel.of(model, matched, StageModules.of(model, matched, 2), None)
    stage = StageForward(parts, range(3, 4))
    tokens = make_batch().inputs["tokens"]
    with pytest.raises(RuntimeError, match=r"must call every block.*skipped the block before blocks\.3"):
        stage(lambda: model(tokens), received)
    model.skipped = 0  # of another stage
    torch.testing.assert_close(stage(lambda: model(tokens), received), model.leave(model.blocks[3](received)))


@pytest.mark.parametrize("kind", [StoresForInspection, Noisy, Model])
def test_outputs_that_no_block_reads_are_allowed(run_ranks, kind):
    def run():
        put_on_two_ranks(kind()).forward_backward([make_batch()] * 2, loss, 1)

    run_ranks(2, run)


def test_gradients_are_wrong_without_the_probe(monkeypatch):
    monkeypatch.setattr(StageRun, "verdict", lambda self: Verdict(True))
    report = check_parallel(
        KeepsAnAttribute,
        {"pp2": ParallelDims.Config(pipeline_parallel_degree=2)},
        roles=ROLES,
        batch=make_batch(8),
        num_microbatches=2,
        steps=1,
    )
    assert not report.ok


REJECTED = [
    (ListAfterTheBlocks, ROLES, "must be defined before them, got ModuleList"),
    (IndexedAfterTheBlocks, ROLES, "must be defined before them, got ModuleList"),
    (CallsANormOfABlock, ROLES, r"called by that block only, got a model that calls blocks\.0\.norm from outside"),
    (ReadsABlock, ROLES, "must run without the blocks and embeddings of other stages, got ReadsABlock"),
    (Rescales, ROLES, "must run without the blocks and embeddings of other stages, got Rescales"),
    (NoTensor, {**ROLES, "places": "embedding"}, "must be called with a tensor, got Places"),
    (
        SharedWithABlock,
        ROLES,
        r"must not share a weight .* got blocks\.1\.mix\.weight, which is also start\.weight",
    ),
    (Model, {"words": "embedding"}, r"pipeline_parallel_degree must be 1 for roles without a block, got 2"),
]


def test_models_that_read_blocks_are_rejected_on_every_rank(run_ranks):
    def run():
        for kind, roles, message in REJECTED:
            with pytest.raises(ConfigError, match=message):
                put_on_two_ranks(kind(), roles).evaluate([make_batch()], loss)

    run_ranks(2, run)


class SampleBySample(Model):
    """Indexes hidden states by sample, between blocks and after the last block."""

    def forward(self, tokens):
        x = self.enter(tokens)
        for block in self.blocks:
            x = x * 1.5
            x = block(torch.stack([x[sample] for sample in range(len(x))]))
        x = self.norm(x)
        return torch.stack([self.head(x[sample]) for sample in range(len(x))])


def test_indexing_hidden_states_by_sample_is_not_reading_outputs_of_a_block():
    batch = make_batch(8)
    report = check_parallel(
        SampleBySample,
        {"pp2": ParallelDims.Config(pipeline_parallel_degree=2)},
        roles={"words": "embedding", "blocks.*": "block"},
        batch=batch,
        num_microbatches=2,
        steps=1,
    )
    assert report.ok, report


class DetachedHead(Model):
    """Has tied weights, with a gradient from the embedding only."""

    def __init__(self):
        super().__init__()
        self.head.weight = self.words.weight

    def leave(self, x):
        return nn.functional.linear(self.norm(x), self.head.weight.detach(), self.head.bias)


def test_a_tied_weight_gets_the_sum_of_the_existing_gradients():
    report = check_parallel(
        DetachedHead,
        {"mesh": ParallelDims.Config(pipeline_parallel_degree=2)},
        roles={"words": "embedding", "blocks.*": "block"},
        batch=make_batch(8),
        num_microbatches=4,
        steps=1,
        timeout_s=60,
    )
    assert report.ok, report
