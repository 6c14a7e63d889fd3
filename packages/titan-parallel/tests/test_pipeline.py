"""A model on a pipeline of ranks computes what it computes on one."""

from __future__ import annotations

import pytest
import torch
from titan_parallel import ParallelDims, parallelize
from titan_parallel.testing import check_same_gradients, full_gradients

SCHEDULES = (
    "1F1B",
    "GPipe",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)


def judge(small, degrees, *, layers=4, number=4, tied=False, **options):
    """The names whose gradients this rank has; raises where anything differs from the plain model, twice over."""
    shape = small.Shape(layers=layers, tied=tied)
    batch = small.make_batch()
    loss, expected, count = small.plain_step(small.make_model(shape), batch)
    dims = ParallelDims.Config(**{"pipeline_parallel_degree": 2, **degrees}).build(
        world_size=torch.distributed.get_world_size(), device_type="cpu"
    )
    model = small.make_model(shape)
    parallel = parallelize(model, small.ROLES, dims, **options)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for _ in range(2):
        loss_sum = parallel.forward_backward(small.micro_batches(batch, dims, number), small.chunked_loss, count)
        found = full_gradients(model)
        torch.testing.assert_close(loss_sum, loss, rtol=1e-12, atol=0)
        check_same_gradients(found, {name: expected[name] for name in found})
        torch.testing.assert_close(parallel.clip_grad_norm_(None), norm, rtol=1e-12, atol=0)
        eval_sum, eval_count = parallel.evaluate(small.micro_batches(batch, dims, 1), small.chunked_loss)
        torch.testing.assert_close(eval_sum, loss, rtol=1e-12, atol=0)
        assert int(eval_count) == count
    return set(found), set(expected)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_schedule_gives_the_gradients_of_the_plain_model(run_ranks, small, tied):
    def run():
        return [judge(small, {"pipeline_parallel_schedule": name}, tied=tied) for name in SCHEDULES]

    for (first, everything), (last, _) in zip(*run_ranks(2, run), strict=True):
        assert first | last == everything
        assert first & last <= {"embedding.weight"} if tied else not first & last
