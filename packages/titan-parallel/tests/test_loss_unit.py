"""Losses of whole sequences: the same number, and the same gradients, however many ranks share a sequence.

B rows, T tokens, P pairs of rows.
"""

from __future__ import annotations

import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from titan_parallel import ParallelDims, check_parallel, parallelize, per_sequence, per_token, sum_over_sequence
from titan_parallel.check import meshes
from titan_parallel.context_parallel import shared_sequences
from titan_parallel.mesh import collectives
from titan_parallel.step import loss_unit
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="builds models of transformers")

ROLES = {"model.embed_tokens": "embedding", "model.layers.*": "block", "lm_head": "head"}
CONTEXT_2 = {"context_parallel_degree": 2}
MESHES = {
    **meshes("cp2", "cp2_ulysses", "fsdp2"),
    "cp2 x pp2": ParallelDims.Config(**CONTEXT_2, pipeline_parallel_degree=2),
    "cp4": ParallelDims.Config(context_parallel_degree=4),
}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def log_probabilities(logits, targets):
    """Of each row's answer `[B]`, of this rank's tokens."""
    labels_BT = targets["labels"]
    return -F.cross_entropy(logits.transpose(1, 2), labels_BT, reduction="none", ignore_index=-100).sum(-1)


def preference(log_p_B, targets):
    chosen_P, rejected_P = (log_p_B - targets["reference"]).unflatten(0, (-1, 2)).unbind(-1)
    losses_P = -F.logsigmoid(0.5 * (chosen_P - rejected_P))
    return losses_P.sum(), torch.tensor(len(losses_P))


@per_sequence
def preference_loss(head, hidden, targets):
    return preference(sum_over_sequence(log_probabilities(head(hidden), targets)), targets)


@per_sequence
def loss_without_a_sum(head, hidden, targets):
    return preference(log_probabilities(head(hidden), targets), targets)


def undecided(head, hidden, targets):
    return preference_loss(head, hidden, targets)


def make_batch(rows=8, length=16):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(48, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, :5] = -100
    reference = torch.randn(rows, generator=generator, dtype=torch.float64)
    return SimpleNamespace(
        inputs={"input_ids": tokens[:, :-1]},
        targets={"labels": labels, "reference": reference},
        sequence_dims={"input_ids": 1, "labels": 1},
    )


def check(loss, names=tuple(MESHES), **options):
    named = {name: MESHES[name] for name in names}
    return check_parallel(llama, named, roles=ROLES, batch=make_batch(), loss=loss, steps=1, **options)


def test_a_preference_loss_is_that_of_one_process():
    report = check(preference_loss)
    assert report.ok, report


def test_a_policy_that_is_its_reference_has_the_loss_ln_2(run_ranks):
    batch = make_batch()
    model = llama().double()
    with torch.no_grad():
        logits = model(**batch.inputs, use_cache=False).logits
        batch.targets["reference"] = log_probabilities(logits, batch.targets)

    def run():
        dims = ParallelDims.Config(**CONTEXT_2).build(world_size=2, device_type="cpu")
        output = lambda made: made.logits  # noqa: E731
        parallel = parallelize(llama().double(), ROLES, dims, output=output)
        loss_sum = parallel.forward_backward([batch], preference_loss, 4)
        eval_sum, count = parallel.evaluate([batch], preference_loss)
        return float(loss_sum) / 4, float(eval_sum) / int(count), int(count)

    for trained, evaluated, count in run_ranks(2, run):
        assert trained == pytest.approx(math.log(2), rel=1e-6)
        assert evaluated == pytest.approx(math.log(2), rel=1e-6)
        assert count == 4


def test_targets_of_rows_alone_are_enough_for_a_loss_of_sequences():
    @per_sequence
    def score(head, hidden, targets):
        scores_B = sum_over_sequence(head(hidden)[..., 0].sum(-1))
        return (scores_B - targets["score"]).square().sum(), torch.tensor(len(scores_B))

    batch = make_batch()
    batch.targets = {"score": batch.targets["reference"]}
    batch.sequence_dims = {"input_ids": 1}
    report = check_parallel(llama, meshes("cp2"), roles=ROLES, batch=batch, loss=score, steps=1)
    assert report.ok, report


def forget_the_gradients_of_others(patch):
    right = collectives.Axis.sum
    patch.setattr(collectives.Axis, "sum", lambda self, x, of_gradients=False: right(self, x, False))
    return "no simple factor|x0.5"


def count_once_a_rank(patch):
    own = lambda self, loss, loss_sum, count: (loss_sum, count)  # noqa: E731
    patch.setattr(shared_sequences.SharedSequences, "own_part", own)
    return "x2.0"


@pytest.mark.parametrize("sabotage", [forget_the_gradients_of_others, count_once_a_rank])
def test_a_broken_sum_is_detected(monkeypatch, sabotage):
    words = sabotage(monkeypatch)
    report = check(preference_loss, ["cp2"])
    assert not report.ok and re.search(words, str(report)), report


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (undecided, "must declare its unit for context_parallel_degree > 1, got undecided without a unit"),
        (loss_without_a_sum, "must be the same on all ranks that share the sequence, got .* Sum what it makes"),
    ],
)
def test_losses_that_cannot_be_split_raise_on_every_rank(run_ranks, loss, words):
    def run():
        dims = ParallelDims.Config(**CONTEXT_2).build(world_size=2, device_type="cpu")
        parallel = parallelize(llama().double(), ROLES, dims, output=lambda made: made.logits)
        with pytest.raises(ValueError, match=words):
            parallel.forward_backward([make_batch()], loss, 4)

    run_ranks(2, run)


def test_functions_methods_partials_and_classes_state_what_they_are():
    class Loss:
        def __call__(self, head, hidden, targets): ...

        def method(self, head, hidden, targets): ...

    for statement, unit in ((per_token, "token"), (per_sequence, "sequence")):
        for stated in (
            statement(lambda head, hidden, targets: None),
            statement(Loss().method),
            statement(functools.partial(undecided)),
            statement(type("Stated", (Loss,), {}))(),
        ):
            assert loss_unit.unit_of(stated) == unit
    assert torch.equal(sum_over_sequence(torch.ones(3)), torch.ones(3))  # no context ranks: all tokens are here


class Slotted:
    __slots__ = ()

    def count(self, targets):
        return torch.tensor(1)

    def __call__(self, head, hidden, targets):
        return hidden.sum(), torch.tensor(1)


def test_a_unit_is_stated_by_the_class_of_a_loss_itself():
    with pytest.raises(TypeError, match=r"must have settable attributes .* got Slotted\. Decorate its class"):
        per_token(Slotted())
    decorated = per_token(Slotted)
    assert loss_unit.unit_of(decorated()) == "token" == loss_unit.unit_of(decorated)

    class OfSequences(decorated):
        """Sums something else."""

    with pytest.raises(ValueError, match=r"must declare its unit .* got .*OfSequences without a unit"):
        loss_unit.unit_of(OfSequences())
    assert loss_unit.unit_of(per_sequence(OfSequences)()) == "sequence"
