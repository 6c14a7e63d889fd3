"""A custom training loop calls the model and its backward directly: gradients are those of DDP."""

from __future__ import annotations

import pytest
import torch
from titan_parallel import Compile, FullActivationCheckpoint
from titan_parallel.tensor_parallel import partial_gradients
from titan_parallel.testing import check_same_gradients, full_gradients
from torch.nn import functional as F

CASES = {
    2: [
        ("fsdp2", {}),
        ("ddp2", {}),
        ("tp2", {}),
        ("tp2_both", {}),
        ("tp2_both", {"activation_checkpoint": FullActivationCheckpoint.Config()}),
        (
            "tp2",
            {
                "compile": Compile.Config(backend="aot_eager"),
                "activation_checkpoint": FullActivationCheckpoint.Config(),
            },
        ),
    ],
    4: [("hsdp2x2", {}), ("fsdp2_tp2", {})],
}


def mean_loss(model, batch):
    return F.cross_entropy(model(**batch.inputs).flatten(0, 1), batch.targets["labels"].flatten())


def step(small, model, batches):
    """Accumulates over the batches, as such loops do."""
    for batch in batches:
        (mean_loss(model, batch) / len(batches)).backward()


def full_batch(small):
    """A batch whose parts count the same: every label is valid."""
    batch = small.make_batch()
    return small.TextBatch(batch.inputs, {"labels": batch.targets["labels"].clamp(min=0)})


@pytest.mark.parametrize("num_ranks", CASES)
def test_gradients_and_norm_are_those_of_the_plain_loop(run_ranks, small, num_ranks):
    def run(mesh, options):
        plain, batch = small.make_model(small.Shape(tied=True)), full_batch(small)
        step(small, plain, [batch])
        expected = {name: p.grad for name, p in plain.named_parameters()}
        parallel = small.put_on(mesh, small.make_model(small.Shape(tied=True)), **options)
        batches = small.micro_batches(batch, parallel.dims, 2)
        parallel.forward_backward(batches, small.chunked_loss, 1)  # a step of the other kind changes nothing
        parallel.model.zero_grad()
        step(small, parallel.model, batches)
        check_same_gradients(full_gradients(parallel.model), expected)
        norm = parallel.clip_grad_norm_(1.0)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        check_same_gradients(full_gradients(parallel.model), expected)
        return True

    assert all(all(ran) for ran in run_ranks(num_ranks, lambda: [run(*case) for case in CASES[num_ranks]]))


@pytest.mark.parametrize(("mesh", "says"), [("tp2", "layers.0.attention"), ("tp2_both", "norm")])
def test_without_the_sum_in_backward_the_difference_is_noticed(run_ranks, small, mesh, says):
    def complaint():
        partial_gradients.PartialGradients.summed_in_backward = lambda self, tensors: tensors
        plain, batch = small.make_model(), full_batch(small)
        step(small, plain, [batch])
        parallel = small.put_on(mesh, small.make_model())
        step(small, parallel.model, [batch])
        with pytest.raises(AssertionError) as caught:
            check_same_gradients(full_gradients(parallel.model), {name: p.grad for name, p in plain.named_parameters()})
        return str(caught.value)

    for said in run_ranks(2, complaint):
        assert says in said


def test_frozen_weights_get_no_gradients(run_ranks, small):
    def run():
        plain, batch = small.make_model(), full_batch(small)
        model = small.make_model()
        for each in (plain, model):
            each.layers[0].requires_grad_(False)
        step(small, plain, [batch])
        parallel = small.put_on("tp2_both", model)
        step(small, model, [batch])
        expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        check_same_gradients(full_gradients(parallel.model), expected)
        return len(expected) < len(list(plain.parameters()))

    assert run_ranks(2, run) == [True, True]
