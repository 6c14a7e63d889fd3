"""Ranks agree before they wait: what is wrong on one rank is an error on every rank, and nobody hangs."""

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
"""Only reached where ranks wait for each other: a group gives up after half an hour."""
TENSOR_2 = {"tensor_parallel_degree": 2}


@pytest.fixture
def on_two_ranks(run_ranks):
    """Call a function on two ranks, which must not wait for each other for long."""
    return partial(run_ranks, 2, timeout_s=LIMIT_S)


def errors_of(attempts, where) -> list[str]:
    """What each attempt says when this rank is one of those where something is `wrong`; then that ranks still agree."""
    said = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt(dist.get_rank() in where)
        said.append(str(caught.value))
    dist.barrier()
    return said


def parallelized(small, wrong, degrees=None, roles=None, shape=None, **options):
    """An attempt to parallelize, with everything as it should be on ranks that are not `wrong`."""
    dims = ParallelDims.Config(**(degrees or {})).build(world_size=2, device_type="cpu")
    model = small.make_model(small.Shape(**(shape or {})) if wrong else None)
    table = {**small.ROLES, **(roles or {})} if wrong else small.ROLES
    return parallelize(model, table, dims, **(options if wrong else {}))


BAD_ROLES = [
    ({"layers.*.feed_forward.up": "columnwise"}, {}, "Got the unknown role 'columnwise'"),
    ({"layers.*.feed_forward.upp": "colwise"}, {}, "Got the pattern 'layers.*.feed_forward.upp', which matches no"),
    ({"layers.0.feed_forward.up": "rowwise"}, {}, "Got two roles for layers.0.feed_forward.up"),
    ({"layers": "block"}, {}, "Got the block layers.0 inside the block layers"),
    ({}, {"hidden": 45}, "Got 45 features of layers.0.feed_forward.up over tensor_parallel_degree 2"),
]


@pytest.mark.parametrize("where", [{0, 1}, {1}], ids=["on both ranks", "on one rank"])
def test_what_does_not_fit_the_model_is_an_error_on_every_rank(on_two_ranks, small, where):
    attempts = [
        partial(parallelized, small, degrees=TENSOR_2, roles=roles, shape=shape) for roles, shape, _ in BAD_ROLES
    ]
    first, second = on_two_ranks(errors_of, attempts, where)
    for said_first, said_second, (_, _, message) in zip(first, second, BAD_ROLES, strict=True):
        assert said_second.startswith(message)
        assert said_first.startswith(message if 0 in where else f"Rank 1 could not parallelize: {message}")


def test_what_stages_and_shared_sequences_refuse_on_one_rank_is_an_error_on_every_rank(on_two_ranks, small):
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
        ["A pipeline must have a block for each stage, got 1 blocks for 2 stages", "Got context"],
        strict=True,
    ):
        assert said_second.startswith(message)
        assert said_first.startswith(f"Rank 1 could not parallelize: {message}")


def test_an_error_that_is_no_config_error_keeps_its_type_where_it_happened(on_two_ranks, small):
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


DIFFERENCES = [  # of rank 1, and how they are reported
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


def test_ranks_that_differ_are_told_in_what_and_who_has_which(on_two_ranks, small):
    def attempt(wrong, options=None, **differences):
        parallelized(small, wrong, None, **differences, **(options or {}))

    attempts = [partial(attempt, **difference) for difference, *_ in DIFFERENCES]
    for said in on_two_ranks(errors_of, attempts, {1}):
        for message, (_, item, other, one) in zip(said, DIFFERENCES, strict=True):
            assert message.startswith(f"Got other {item} on rank 1 ({other}") and f"on rank 0 ({one}" in message


def test_ranks_that_drew_other_weights_are_told_where(on_two_ranks, small):
    def attempt(wrong):
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        model = small.make_model()
        if wrong:
            with torch.no_grad():
                model.layers[1].feed_forward.up.weight.add_(1e-12)
        parallelize(model, small.ROLES, dims)

    for (said,) in on_two_ranks(errors_of, [attempt], {1}):
        assert said.startswith("Got other weights on rank 1 (layers.1.feed_forward.up.weight begins with [")


def test_degrees_that_do_not_divide_or_differ_are_an_error_on_every_rank(on_two_ranks):
    def build(wrong, degrees, world_size=2):
        ParallelDims.Config(**(degrees if wrong else {})).build(
            world_size=world_size if wrong else 2, device_type="cpu"
        )

    attempts = [partial(build, degrees={"tensor_parallel_degree": degree}) for degree in (3, 0, 2)]
    first, second = on_two_ranks(errors_of, attempts, {1})
    for index, message in enumerate(["Got tensor_parallel_degree 3 on 2 ranks.", "Got tensor_parallel_degree 0."]):
        assert second[index].startswith(message)
        assert first[index].startswith(f"Rank 1 could not build a mesh: {message}")
    assert first[2] == second[2] and first[2].startswith("Got other degrees on rank 1 (ParallelDims.Config(")


def test_a_step_that_differs_between_ranks_is_an_error_on_every_rank(on_two_ranks, small):
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
    assert second[0].startswith("Got no batches.")
    assert first[0].startswith("Rank 1 could not forward_backward: Got no batches.")
    assert second[3].startswith("Got a sequence of 13 tokens over tensor_parallel_degree 2.")
    assert first[3].startswith("Rank 1 could not forward_backward: Got a sequence of 13 tokens")
    for said in (first, second):
        assert said[1].startswith("Got other numbers of batches on rank 1 (2) than on rank 0 (1).")
        assert said[2].startswith("Got other calls on rank 1 (evaluate) than on rank 0 (forward_backward).")
        assert "on rank 1 (number 0: tokens [4, 12] int64," in said[4]
        assert "on rank 0 (number 0: tokens [8, 12] int64," in said[4]
        assert said[5].count("tokens [8, 12] int64, positions [8, 12] int64, labels [8, 12] int64, contents ") == 2


def test_without_agreement_the_others_would_wait(on_two_ranks, small):
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
                has_given_up.wait()  # a process that ends would wake the other
            has_given_up.set()
            return type(error), str(error)

    (waited, said), (own, _) = on_two_ranks(step)
    assert (waited, own) == (RuntimeError, ValueError) and "time" in said.lower()


def test_groups_of_ranks_may_differ_where_only_a_group_must_agree(run_ranks):
    def agree():
        rank = dist.get_rank()
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        with RankConsistencyCheck("pair up", "cpu") as consistency:
            consistency.on("pairs", f"of rank {pair[0]}", pair)
        with pytest.raises(ConfigError) as caught, RankConsistencyCheck("pair up", "cpu") as consistency:
            consistency.on("pairs", "many\nlines" if rank == 3 else "", pair)
        return str(caught.value)

    for said in run_ranks(4, agree, timeout_s=LIMIT_S):
        assert said.startswith("Got other pairs on rank 3 (many) than on rank 2 (nothing).")


def test_agreeing_costs_one_small_sum(on_two_ranks, small):
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


def test_a_rank_alone_agrees_without_asking(on_one_rank):
    def check():
        dist.all_reduce = None
        with RankConsistencyCheck("do nothing", "cpu") as consistency:
            consistency.on("words", "the same")
        with pytest.raises(KeyError), RankConsistencyCheck("fail", "cpu"):
            raise KeyError("x")

    on_one_rank(check)
