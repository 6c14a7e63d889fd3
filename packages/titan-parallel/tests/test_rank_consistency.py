"""Rank consistency check: an error or a difference on one rank is raised on every rank, and no rank hangs."""

from __future__ import annotations

import multiprocessing
import operator
from functools import partial

import pytest
import torch
import torch.distributed as dist
import transformers
from titan_config import ConfigError
from titan_parallel import (
    Compile,
    FullActivationCheckpoint,
    MixedPrecision,
    ParallelDims,
    parallelize,
    set_collective_timeout,
)
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck

LIMIT_S = 900
"""Reached only if ranks wait for each other: the collective timeout is half an hour."""
TENSOR_2 = {"tensor_parallel_degree": 2}


@pytest.fixture
def on_two_ranks(run_ranks):
    """Return a function that runs its argument on two ranks, with the time limit `LIMIT_S`."""
    return partial(run_ranks, 2, timeout_s=LIMIT_S)


def errors_of(attempts, where) -> list[str]:
    """Return the error message of each attempt, with something `wrong` on the ranks `where`; ranks stay in step."""
    said = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt(dist.get_rank() in where)
        said.append(str(caught.value))
    dist.barrier()
    return said


def parallelized(small, wrong, degrees=None, roles=None, shape=None, **options):
    """Call `parallelize`; the changes apply only on ranks that are `wrong`."""
    dims = ParallelDims.Config(**(degrees or {})).build(world_size=2, device_type="cpu")
    model = small.make_model(small.Shape(**(shape or {})) if wrong else None)
    table = {**small.ROLES, **(roles or {})} if wrong else small.ROLES
    return parallelize(model, table, dims, **(options if wrong else {}))


BAD_ROLES = [
    ({"layers.*.feed_forward.up": "columnwise"}, {}, "The role of pattern 'layers.*.feed_forward.up' must be one of"),
    ({"layers.*.feed_forward.upp": "colwise"}, {}, "The pattern 'layers.*.feed_forward.upp' must match a module"),
    ({"layers.0.feed_forward.up": "rowwise"}, {}, "layers.0.feed_forward.up must have one role, got colwise"),
    ({"layers": "block"}, {}, "A block must not contain another block, got layers.0 inside layers"),
    ({}, {"hidden": 45}, "tensor_parallel_degree must divide features (45) of layers.0.feed_forward.up, got 2"),
]


@pytest.mark.parametrize("where", [{0, 1}, {1}], ids=["on both ranks", "on one rank"])
def test_invalid_roles_raise_on_every_rank(on_two_ranks, small, where):
    attempts = [
        partial(parallelized, small, degrees=TENSOR_2, roles=roles, shape=shape) for roles, shape, _ in BAD_ROLES
    ]
    first, second = on_two_ranks(errors_of, attempts, where)
    for said_first, said_second, (_, _, message) in zip(first, second, BAD_ROLES, strict=True):
        assert said_second.startswith(message)
        assert said_first.startswith(message if 0 in where else f"Rank 1 could not parallelize: {message}")


def test_pipeline_and_context_parallel_errors_raise_on_every_rank(on_two_ranks, small):
    tiny = {"hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}

    def one_block(wrong):
        parallelized(small, wrong, {"pipeline_parallel_degree": 2}, shape={"layers": 1})

    def computes_attention_by_itself(wrong):
        dims = ParallelDims.Config(context_parallel_degree=2).build(world_size=2, device_type="cpu")
        bloom, llama = transformers.BloomConfig(**tiny), transformers.LlamaConfig(**tiny, intermediate_size=48)
        model = transformers.BloomForCausalLM(bloom) if wrong else transformers.LlamaForCausalLM(llama)
        parallelize(model, {}, dims, output=operator.attrgetter("logits"))

    first, second = on_two_ranks(errors_of, [one_block, computes_attention_by_itself], {1})
    for said_first, said_second, message in zip(
        first,
        second,
        [
            "A pipeline must have a block for each stage, got 1 blocks for 2 stages",
            "context_parallel_degree must be 1 for a model that does not use the attention interface",
        ],
        strict=True,
    ):
        assert said_second.startswith(message)
        assert said_first.startswith(f"Rank 1 could not parallelize: {message}")


def test_other_errors_keep_their_type_on_the_failing_rank(on_two_ranks, small):
    def attempt():
        roles = None if dist.get_rank() == 1 else small.ROLES
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        try:
            parallelize(small.make_model(), roles, dims)
        except Exception as error:
            return type(error), str(error)

    (other, said), (own, _) = on_two_ranks(attempt)
    assert (other, own) == (ConfigError, AttributeError)
    assert said.startswith("Rank 1 could not parallelize: AttributeError: ")


DIFFERENCES = [  # changes on rank 1, and how they are reported
    (
        {"options": {"activation_checkpoint": FullActivationCheckpoint.Config()}},
        "activation_checkpoint",
        "FullActivationCheckpoint",
        "None",
    ),
    ({"options": {"compile": Compile.Config()}}, "compile", "Compile.Config(backend='inductor')", "None"),
    ({"options": {"mixed_precision": MixedPrecision.Config()}}, "mixed_precision", "MixedPrecision", "None"),
    ({"roles": {"norm": "attention"}}, "roles", "norm attention", "norm norm"),
    ({"shape": {"layers": 3}}, "roles", "layers.2 block", "norm norm"),
    ({"shape": {"vocab": 66}}, "parameters", "embedding.weight [66, 32] float64", "embedding.weight [64, 32] float64"),
]


def test_differences_between_ranks_raise_on_every_rank(on_two_ranks, small):
    def attempt(wrong, options=None, **differences):
        parallelized(small, wrong, None, **differences, **(options or {}))

    attempts = [partial(attempt, **difference) for difference, *_ in DIFFERENCES]
    for said in on_two_ranks(errors_of, attempts, {1}):
        for message, (_, item, other, one) in zip(said, DIFFERENCES, strict=True):
            assert message.startswith(f"Ranks must have the same {item}, got {other}")
            assert f" on rank 1 and {one}" in message and message.endswith(" on rank 0.")


def test_different_initial_weights_raise_on_every_rank(on_two_ranks, small):
    def attempt(wrong):
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        model = small.make_model()
        if wrong:
            with torch.no_grad():
                model.layers[1].feed_forward.up.weight.add_(1e-12)
        parallelize(model, small.ROLES, dims)

    for (said,) in on_two_ranks(errors_of, [attempt], {1}):
        assert said.startswith("Ranks must have the same weights, got layers.1.feed_forward.up.weight begins with [")
        assert "] on rank 1 and layers.1.feed_forward.up.weight begins with [" in said and said.endswith("on rank 0.")


def test_invalid_or_different_degrees_raise_on_every_rank(on_two_ranks):
    def build(wrong, degrees, world_size=2):
        ParallelDims.Config(**(degrees if wrong else {})).build(
            world_size=world_size if wrong else 2, device_type="cpu"
        )

    attempts = [partial(build, degrees={"tensor_parallel_degree": degree}) for degree in (3, 0, 2)]
    first, second = on_two_ranks(errors_of, attempts, {1})
    messages = [
        "tensor_parallel_degree must divide the number of ranks (2), got 3.",
        "tensor_parallel_degree must be at least 1, got 0.",
    ]
    for index, message in enumerate(messages):
        assert second[index].startswith(message)
        assert first[index].startswith(f"Rank 1 could not build a mesh: {message}")
    assert first[2] == second[2] and first[2].startswith("Ranks must have the same degrees, got ParallelDims.Config(")


def test_different_steps_raise_on_every_rank(on_two_ranks, small):
    def differences():
        batch = small.make_batch()
        parallel = {mesh: small.put_on(mesh, small.make_model()) for mesh in ("fsdp2", "tp2_both")}

        def step(wrong, mesh, batches, call="forward_backward"):
            if wrong:
                getattr(parallel[mesh], call)(batches, small.chunked_loss, *([1] if call == "forward_backward" else []))
            else:
                parallel[mesh].forward_backward([batch], small.chunked_loss, 1)

        attempts = [
            partial(step, mesh="fsdp2", batches=[]),
            partial(step, mesh="fsdp2", batches=[batch, batch]),
            partial(step, mesh="fsdp2", batches=[batch], call="evaluate"),
            partial(step, mesh="tp2_both", batches=[small.make_batch(length=13)]),
            partial(step, mesh="tp2_both", batches=[batch.rows(0, 4)]),
            partial(step, mesh="tp2_both", batches=[small.make_batch(seed=2)]),
        ]
        said = errors_of(attempts, {1})
        whole = float(parallel["tp2_both"].forward_backward([batch], small.chunked_loss, 1))
        parallel["fsdp2"].forward_backward([batch.rows(0, 4 + dist.get_rank())], small.chunked_loss, 1)  # may differ
        return said, whole

    (first, loss), (second, other_loss) = on_two_ranks(differences)
    assert loss == other_loss
    assert second[0].startswith("A step must have at least one batch")
    assert first[0].startswith("Rank 1 could not forward_backward: A step must have at least one batch")
    of_length = "The sequence length must be a multiple of tensor_parallel_degree (2) with sequence parallelism, got 13"
    assert second[3].startswith(of_length)
    assert first[3].startswith(f"Rank 1 could not forward_backward: {of_length}")
    for said in (first, second):
        assert said[1] == "Ranks must have the same numbers of batches, got 2 on rank 1 and 1 on rank 0."
        assert said[2] == "Ranks must have the same calls, got evaluate on rank 1 and forward_backward on rank 0."
        assert said[4].startswith("Ranks must have the same batches, got number 0: tokens [4, 12] int64,")
        assert "on rank 1 and number 0: tokens [8, 12] int64," in said[4]
        assert said[5].count("tokens [8, 12] int64, positions [8, 12] int64, labels [8, 12] int64, contents ") == 2


def test_without_the_check_the_other_ranks_time_out(on_two_ranks, small):
    has_given_up = multiprocessing.get_context("fork").Event()

    def step():
        parallel = small.put_on("fsdp2", small.make_model())
        set_collective_timeout(parallel.dims, 1.5)
        RankConsistencyCheck.__exit__ = lambda *args: None
        batches = [] if dist.get_rank() else [small.make_batch()]
        try:
            parallel.forward_backward(batches, small.chunked_loss, 1)
        except Exception as error:
            if dist.get_rank():
                has_given_up.wait()  # the end of this process would end the wait of the other
            has_given_up.set()
            return type(error), str(error)

    (waited, said), (own, _) = on_two_ranks(step)
    assert (waited, own) == (RuntimeError, ValueError) and "time" in said.lower()


def test_texts_are_compared_within_a_group_of_ranks(run_ranks):
    def agree():
        rank = dist.get_rank()
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        with RankConsistencyCheck("pair up", "cpu") as consistency:
            consistency.on("pairs", f"of rank {pair[0]}", pair)
        with pytest.raises(ConfigError) as caught, RankConsistencyCheck("pair up", "cpu") as consistency:
            consistency.on("pairs", "many\nlines" if rank == 3 else "", pair)
        return str(caught.value)

    for said in run_ranks(4, agree, timeout_s=LIMIT_S):
        assert said == "Ranks must have the same pairs, got many on rank 3 and nothing on rank 2."


def test_the_check_is_one_all_reduce_of_three_integers(on_two_ranks, small):
    def collectives():
        calls = []
        names = ("all_reduce", "all_gather", "broadcast")
        for name in names:
            original = getattr(dist, name)
            setattr(dist, name, lambda *args, o=original, n=name, **kw: (calls.append((n, args[0])), o(*args, **kw))[1])
        with RankConsistencyCheck("do nothing", "cpu") as consistency:
            consistency.on("words", "the same")
        return [(name, tensor.numel(), tensor.dtype) for name, tensor in calls]

    assert on_two_ranks(collectives) == [[("all_reduce", 3, torch.int64)]] * 2


def test_a_single_rank_runs_no_collective(on_one_rank):
    def check():
        dist.all_reduce = None
        with RankConsistencyCheck("do nothing", "cpu") as consistency:
            consistency.on("words", "the same")
        with pytest.raises(KeyError), RankConsistencyCheck("fail", "cpu"):
            raise KeyError("x")

    on_one_rank(check)
