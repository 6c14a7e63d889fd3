"""The check of gradients sees what could be wrong: each test breaks the engine on purpose."""

from __future__ import annotations

import pytest
import torch
from titan_parallel import collectives, gradient_norm, local_view, parallel_model
from titan_parallel.testing import check_same_gradients, full_gradients
from torch.distributed.fsdp import FSDPModule


def complaint(small, mesh, before=None, after=None, share=None) -> str:
    """What the check says of a mesh, with the engine changed by `before` and the model by `after`."""
    if before is not None:
        before()
    model = small.make_model()
    batch = small.make_batch()
    _, expected, count = small.plain_step(model, batch)
    parallel = small.put_on(mesh, model)
    if after is not None:
        after(model)
    batches = small.micro_batches(batch, parallel.dims)
    if share is not None:
        count = share(batches, count)
    parallel.forward_backward(batches, small.chunked_loss, count)
    try:
        check_same_gradients(full_gradients(model), expected)
    except AssertionError as error:
        return str(error)
    return ""


def drop_partial_gradient_sum():
    parallel_model.ParallelModel._sum_partial_gradients = lambda self: None


def drop_sum_on_exit():
    collectives.Axis.sum = lambda self, x: x


def drop_gradient_sum_on_entry():
    collectives.Axis.copy = lambda self, x: x


def take_own_tokens_without_sum():
    collectives.Axis.sum_scatter_sequence = lambda self, x: x.chunk(self.size, -2)[self.rank]


def add_biases_on_every_rank():
    local_view.LocalView._local = lambda self, module, name: module._parameters[name].to_local()


def average_over_ranks(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0)


def never_synchronise(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync = lambda *args, **kwargs: None
            FSDPModule.set_requires_gradient_sync(module, False)


def own_count(batches, count):
    return sum(int((batch.targets["labels"] != -100).sum()) for batch in batches)


@pytest.mark.parametrize(
    ("mesh", "change", "says"),
    [
        ("tp2_both", {"before": drop_partial_gradient_sum}, "norm"),
        ("tp2", {"before": drop_partial_gradient_sum}, "layers.0.attention"),
        ("tp2", {"before": drop_sum_on_exit}, "differs"),
        ("tp2", {"before": drop_gradient_sum_on_entry}, "differs"),
        ("tp2_both", {"before": take_own_tokens_without_sum}, "differs"),
        ("tp2_both", {"before": add_biases_on_every_rank}, "differs"),
        ("fsdp2", {"after": average_over_ranks}, "x0.5,"),
        ("fsdp2", {"after": never_synchronise}, "Only one side"),
        ("fsdp2", {"share": own_count}, "differs"),
    ],
)
def test_a_broken_engine_is_noticed_on_every_rank(run_ranks, small, mesh, change, says):
    for said in run_ranks(2, lambda: complaint(small, mesh, **change)):
        assert says in said


def test_a_norm_that_counts_replicated_gradients_twice_is_noticed(run_ranks, small):
    def norms() -> tuple[float, float]:
        parallel = small.put_on("ddp2", small.make_model())
        batch = small.make_batch()
        parallel.forward_backward(small.micro_batches(batch, parallel.dims), small.chunked_loss, 1)
        right = parallel.clip_grad_norm_(None)
        gradient_norm._counts_here = lambda gradient: True
        return float(right), float(parallel.clip_grad_norm_(None))

    for right, wrong in run_ranks(2, norms):
        assert wrong == pytest.approx(right * 2**0.5)


def test_the_check_names_the_parameter_and_the_factor():
    expected = {"a": torch.ones(3), "b": torch.ones(3), "zero": torch.zeros(3)}
    check_same_gradients({**expected, "zero": torch.full((3,), 1e-9)}, expected)
    with pytest.raises(AssertionError, match=r"gradient of b .*x2,"):
        check_same_gradients({**expected, "b": 2 * torch.ones(3)}, expected)
    with pytest.raises(AssertionError, match=r"gradient of a "):
        check_same_gradients({**expected, "a": torch.full((3,), float("nan"))}, expected)
    with pytest.raises(AssertionError, match="Only one side has b"):
        check_same_gradients({"a": expected["a"], "zero": expected["zero"]}, expected)
