"""A pipelined model has the losses and gradients of one process, with every schedule."""

from __future__ import annotations

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import (
    Compile,
    FullActivationCheckpoint,
    MixedPrecision,
    ParallelDims,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
    parallelize,
)
from titan_parallel.pipeline_parallel.split_points import cut_by_cost
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn
from torch.distributed.fsdp import FSDPModule

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
TENSOR_2 = {"tensor_parallel_degree": 2}


def make_dims(degrees):
    world_size = torch.distributed.get_world_size()
    return ParallelDims.Config(**{"pipeline_parallel_degree": 2, **degrees}).build(
        world_size=world_size, device_type="cpu"
    )


def judge(small, degrees, *, layers=4, number=4, tied=False, **options):
    """Run two steps and compare with the plain model; return the names of the gradients of this rank and of all."""
    shape = small.Shape(layers=layers, tied=tied)
    batch = small.make_batch()
    loss, expected, count = small.plain_step(small.make_model(shape), batch)
    dims, model = make_dims(degrees), small.make_model(shape)
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
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert set(parallel.nonlocal_parameters) == set(expected) - set(found)
    return set(found), set(expected)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_schedule_gives_the_gradients_of_the_plain_model(run_ranks, small, tied):
    def run():
        return [judge(small, {"pipeline_parallel_schedule": name}, tied=tied) for name in SCHEDULES]

    for (first, everything), (last, _) in zip(*run_ranks(2, run), strict=True):
        assert first | last == everything
        assert first & last <= {"embedding.weight"} if tied else not first & last


def cases(schedules):
    """(degrees, options) on four ranks."""
    always = {"fsdp_reshard_after_forward": "always"}
    for name in schedules:
        schedule = {"pipeline_parallel_schedule": name}
        yield {**schedule, **TENSOR_2}, {"activation_checkpoint": SelectiveActivationCheckpoint.Config()}
        yield {**schedule, **TENSOR_2, "sequence_parallel": False}, {"tied": True}
        yield schedule, {"tied": True}
        yield {**schedule, **always}, {"tied": True, "activation_checkpoint": PeriodicActivationCheckpoint.Config(n=2)}
        yield (
            {**schedule, "data_parallel_replicate_degree": 2},
            {"activation_checkpoint": FullActivationCheckpoint.Config()},
        )


@pytest.mark.parametrize(
    "schedules", [("InterleavedZeroBubble",), pytest.param(SCHEDULES, marks=pytest.mark.full)], ids=["one", "all"]
)
def test_with_tensor_and_data_parallel_and_recomputation(run_ranks, small, schedules):
    def run():
        for degrees, options in cases(schedules):
            judge(small, degrees, **options)

    run_ranks(4, run, timeout_s=1200)


def test_four_stages_on_four_ranks_and_more_stages_than_two_on_each(run_ranks, small):
    def run():
        four = {"pipeline_parallel_degree": 4}
        judge(small, four, tied=True)
        judge(small, {**four, "pipeline_parallel_schedule": "ZBVZeroBubble"}, layers=8, tied=True)
        three_each = {"pipeline_parallel_schedule": "Interleaved1F1B", "pipeline_parallel_stages_per_rank": 3}
        judge(small, three_each, layers=7)
        with pytest.raises(ConfigError, match=r"must not share a weight .* got layers\.2\.weight, which is"):
            parallelize(Looped(), LOOPED_ROLES, make_dims(four))

    run_ranks(4, run)


def test_bf16_between_stages(run_ranks, small):
    """Gradients differ from fp64 by no more than the bf16 rounding error measured in one process."""
    shape, batch = small.Shape(layers=4, tied=True), small.make_batch()
    reference = small.refer(small.make_model(shape, torch.float32), batch, torch.bfloat16)

    def run(schedule):
        dims = make_dims({"pipeline_parallel_schedule": schedule})
        model = small.make_model(shape, dtype=torch.float32)
        parallel = parallelize(model, small.ROLES, dims, mixed_precision=MixedPrecision.Config())
        parallel.forward_backward(small.micro_batches(batch, dims, 4), small.chunked_loss, reference.count)
        reference.check_gradients(full_gradients(model))

    run_ranks(2, lambda: [run(schedule) for schedule in ("1F1B", "ZBVZeroBubble")])


def test_compiled_blocks(run_ranks, small):
    degrees, compiler = {"pipeline_parallel_schedule": "Interleaved1F1B"}, Compile.Config(backend="aot_eager")
    run_ranks(2, lambda: judge(small, degrees, compile=compiler))


def test_a_rank_holds_only_its_stages_and_names_do_not_change(run_ranks, small):
    def run():
        with torch.device("meta"):
            model = small.Transformer(small.Shape(tied=True))
        whole = [name for name, _ in model.named_parameters()]
        parallelize(model, small.ROLES, make_dims({}))
        return whole, [name for name, _ in model.named_parameters()]

    (whole, first), (_, last) = run_ranks(2, run)
    assert first == [name for name in whole if name.startswith(("embedding", "layers.0"))]
    assert last == [name for name in whole if name.startswith(("embedding", "layers.1", "norm", "head"))]


def test_the_hook_sees_each_summed_gradient_once(run_ranks, small):
    def run():
        batch = small.make_batch()
        _, expected, count = small.plain_step(small.make_model(small.Shape(layers=4)), batch)
        dims, model = (
            make_dims({"pipeline_parallel_schedule": "ZBVZeroBubble"}),
            small.make_model(small.Shape(layers=4)),
        )
        parallel = parallelize(model, small.ROLES, dims)
        parallel.set_gradient_hook(lambda gradient: gradient.mul_(3))
        parallel.forward_backward(small.micro_batches(batch, dims, 4), small.chunked_loss, count)
        found = full_gradients(model)
        check_same_gradients(found, {name: expected[name] * 3 for name in found})

    run_ranks(4, run)


def test_stages_are_split_by_cost():
    assert cut_by_cost([1] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [len(own) for own in cut_by_cost([1] * 8, 2, last=2)] == [5, 3]  # the head costs as two blocks
    for costs, num_stages, last in (([1, 9, 1, 1, 1, 5, 5], 3, 0), ([2] * 9, 4, 5), ([3, 1, 4, 1, 5, 9, 2, 6], 5, 3)):
        cut = cut_by_cost(costs, num_stages, last)
        assert [i for own in cut for i in own] == list(range(len(costs)))
        assert all(cut)
        assert dearest(costs, cut, last) == min(dearest(costs, way, last) for way in every_cut(len(costs), num_stages))


def dearest(costs, cut, last):
    sums = [sum(costs[i] for i in own) for own in cut]
    return max([*sums[:-1], sums[-1] + last])


def every_cut(num_blocks, num_stages):
    def cuts(start, left):
        if left == 1:
            yield [range(start, num_blocks)]
            return
        for stop in range(start + 1, num_blocks - left + 2):
            for rest in cuts(stop, left - 1):
                yield [range(start, stop), *rest]

    return cuts(0, num_stages)


def test_stages_begin_at_named_blocks(run_ranks, small):
    first, last = run_ranks(2, judge, small, {"pipeline_parallel_splits": ["layers.3"]})
    assert "layers.2.feed_forward.up.weight" in first[0]
    assert {name.split(".")[1] for name in last[0] if name.startswith("layers")} == {"3"}


class Looped(nn.Module):
    """Has blocks that share a weight, or the same block twice."""

    def __init__(self, whole=False):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(64, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        if whole:
            self.layers[3] = self.layers[0]
        else:
            self.layers[2].weight = self.layers[1].weight
        self.head = nn.Linear(8, 64)


LOOPED_ROLES = {"embedding": "embedding", "layers.*": "block", "head": "head"}

BAD = [
    ({"pipeline_parallel_schedule": "Interleaved1F1B"}, {}, "2 blocks for 4 stages"),
    (
        {"pipeline_parallel_splits": ["layers.7"]},
        {},
        r"names of blocks \(layers\.0 to layers\.1\), got 'layers\.7'",
    ),
    ({"pipeline_parallel_splits": ["layers.0"]}, {}, r"must be in the order of the blocks, .* got \['layers\.0'\]"),
    (
        {"pipeline_parallel_splits": ["layers.1", "layers.0"]},
        {},
        r"must have 1 names for 2 stages .*, got 2\.",
    ),
    ({"pipeline_parallel_stages_per_rank": 2}, {}, r"must be 1 or None for the schedule 1F1B, got 2\."),
    (
        {"pipeline_parallel_stages_per_rank": 1, "pipeline_parallel_schedule": "DualPipeV"},
        {},
        r"must be 2 or None for the schedule DualPipeV, got 1\.",
    ),
    (
        {"pipeline_parallel_stages_per_rank": 1, "pipeline_parallel_schedule": "InterleavedZeroBubble"},
        {"compile": Compile.Config(backend="aot_eager")},
        "for compiled blocks, got InterleavedZeroBubble",
    ),
]


def test_invalid_configs_raise_on_every_rank(run_ranks, small):
    def run():
        for degrees, options, message in BAD:
            with pytest.raises(ConfigError, match=message):
                parallelize(small.make_model(), small.ROLES, make_dims(degrees), **options)
        with pytest.raises(ConfigError, match="must be distinct modules, got layers, which contains the same module"):
            parallelize(Looped(whole=True), LOOPED_ROLES, make_dims({}))
        with pytest.raises(ConfigError, match="without a block"):
            parallelize(Looped(), {"embedding": "embedding"}, make_dims({}))

    run_ranks(2, run)


FILES = {
    "0F0,0B0": "1 rows for 2 ranks",
    "0F0,0B0\n1F0,what": "Invalid action string: what",
    "0F0,0B0\n2F0,2B0": r"stages must be numbered 0, 1, 2, \.\.\., got \[0, 2\]",
    "0F0,0B0\n1F0": "Invalid backward microbatches for stage 1",
    "0B0,0F0\n1F0,1B0": "without first running Forward",
    "0F0,0SEND_F0,0B0\n1F0,1B0": "0SEND_F0 is not a compute action",
    "0F1,0F0,0B0,0B1\n1F0,1F1,1B0,1B1": r"stage 0 must run forwards in ascending order, got \[1, 0\]",
    "0F0,1F0,1B0,0B0\n": "1 rows for 2 ranks",
    "0F0,1F0,1B0,0B0\n,": "rank 1 has no stage",
    "0F0,0B0,2F0,2B0\n1F0,1B0": "can't schedule sends/recvs",
}


def test_a_schedule_from_a_csv_file(run_ranks, small, tmp_path):
    good = tmp_path / "good.csv"
    good.write_text("0F0,0F1,0F2,,,0B0,0F3,0B1,0B2,0B3\n,1F0,1I0,1F1,1B1,1W0,1F2,1B2,1F3,1B3\n")

    for number, text in enumerate(FILES):
        (tmp_path / f"{number}.csv").write_text(text)

    def run():
        judge(small, {"pipeline_parallel_schedule_csv": good}, layers=2, tied=True)
        for number, message in enumerate(FILES.values()):
            file = tmp_path / f"{number}.csv"
            with pytest.raises(ConfigError, match=message):
                parallelize(small.make_model(), small.ROLES, make_dims({"pipeline_parallel_schedule_csv": file}))
        with pytest.raises(ConfigError, match=r"must be a readable CSV file .* got .*absent\.csv: .*No such file"):
            absent = {"pipeline_parallel_schedule_csv": tmp_path / "absent.csv"}
            parallelize(small.make_model(), small.ROLES, make_dims(absent))

    run_ranks(2, run)


def test_invalid_micro_batches_raise_on_every_rank(run_ranks, small, tmp_path):
    file = tmp_path / "two.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n")
    too_few = {
        "1F1B": (1, r"must be at least 2 \(the number of stages\) for the pipeline schedule 1F1B, got 1\."),
        "DualPipeV": (2, r"must be at least 4 \(the number of stages\) for the pipeline schedule DualPipeV, got 2\."),
        "Interleaved1F1B": (5, r"must be a multiple of 2 .* for the pipeline schedule Interleaved1F1B, got 5\."),
    }

    def run():
        batch = small.make_batch()
        shape = small.Shape(layers=4)
        for name, (number, message) in too_few.items():
            parallel = parallelize(
                small.make_model(shape), small.ROLES, make_dims({"pipeline_parallel_schedule": name})
            )
            batches = [batch.rows(row, row + 1) for row in range(number)]
            with pytest.raises(ValueError, match=message):
                parallel.forward_backward(batches, small.chunked_loss, 1)
        parallel = parallelize(small.make_model(), small.ROLES, make_dims({"pipeline_parallel_schedule_csv": file}))
        with pytest.raises(ValueError, match=r"must be 2 for the pipeline schedule two\.csv, got 1\."):
            parallel.forward_backward([batch], small.chunked_loss, 1)
        uneven = [batch.rows(0, 2), batch.rows(2, 3)]
        with pytest.raises(ValueError, match=r"got tokens: shape \[2, 12\] .* shape \[1, 12\] .* in micro-batch 2"):
            parallel.forward_backward(uneven, small.chunked_loss, 1)
        count = int((batch.rows(0, 3).targets["labels"] != -100).sum())
        assert int(parallel.evaluate(uneven, small.chunked_loss)[1]) == count
        with pytest.raises(RuntimeError, match="direct call of its forward, while each rank holds only some"):
            parallel.model(**batch.inputs)

    run_ranks(2, run)


class OutOfOrder(nn.Module):
    """Calls a module before the blocks that is defined after them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(64, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head, self.norm = nn.Linear(8, 64), nn.LayerNorm(8)

    def forward(self, tokens, positions):
        x = self.norm(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_module_of_the_wrong_stage_is_named_on_every_rank(run_ranks, small):
    def run():
        roles = {"embedding": "embedding", "layers.*": "block", "head": "head"}
        parallel = parallelize(OutOfOrder(), roles, make_dims({}))
        with pytest.raises(
            ConfigError, match="must be defined before them, got LayerNorm, which is defined after them"
        ):
            parallel.evaluate([small.make_batch()], small.chunked_loss)

    run_ranks(2, run)


def drop_the_sum_of_tied_gradients():
    import titan_parallel.pipeline_parallel.schedule

    titan_parallel.pipeline_parallel.schedule.sum_over_holders = lambda *_: None


def give_the_second_stage_other_activations():
    from titan_parallel.pipeline_parallel.stage_runner import StageRunner

    run, before = StageRunner.run, {}

    def shifted(self, stage, micro_batch, received):
        if received is not None and self.model.training:
            before[micro_batch] = received.detach().clone()
            received = received + (before.get(micro_batch - 1, received) - received).detach()
        return run(self, stage, micro_batch, received)

    StageRunner.run = shifted


def count_tied_weights_twice():
    from titan_parallel.pipeline_parallel.partition import Stages

    Stages.duplicate_parameters = ()


def average_over_micro_batches():
    from torch.distributed.pipelining.stage import PipelineStage

    reduce = PipelineStage.perform_reduce_grad

    def averaged(self, factor):
        reduce(self, factor)
        if isinstance(self.submod, FSDPModule):
            for parameter in self.submod.parameters():
                parameter.grad.div_(4)

    PipelineStage.perform_reduce_grad = averaged


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        (drop_the_sum_of_tied_gradients, "gradient of embedding.weight differs"),
        (give_the_second_stage_other_activations, "differs|not close"),
        (count_tied_weights_twice, "Scalars are not close"),
        (average_over_micro_batches, "x0.25"),
    ],
)
def test_a_broken_pipeline_is_detected(run_ranks, small, sabotage, says):
    def run():
        sabotage()
        with pytest.raises(AssertionError, match=says):
            judge(small, {}, tied=True)

    run_ranks(2, run)
