"""Balancing of experts counts the whole global batch once, on any mesh and whatever is recomputed or accumulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from titan_models import Constant, Decoder, FeedForward, SwiGLU
from titan_models.moe import (
    BalancingBias,
    ExpertGroups,
    LoadBalancingLoss,
    MoE,
    SwiGLUExperts,
    TopKRouter,
    ZLoss,
)
from titan_models.qwen3 import qwen3_moe_debug
from titan_models.training.step_counter import StepCounter
from titan_parallel import (
    Compile,
    FullActivationCheckpoint,
    ParallelDims,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
    check_parallel,
    cross_entropy,
    parallelize,
)
from titan_parallel.check import meshes
from titan_parallel.step.auxiliary_losses import AuxiliaryLosses
from titan_parallel.step.statistics import StepStatistics
from titan_parallel.testing import check_same_gradients, full_gradients

TWO_RANKS = ("fsdp2", "ddp2", "tp2", "tp2_sp", "cp2_gather", "cp2_ulysses", "cp2_ring", "pp2")
ZERO_BUBBLE = ("pp2_zbvzerobubble", "pp2_interleavedzerobubble")
FOUR_RANKS = ("fsdp4", "ddp2_fsdp2", "fsdp2_tp2_sp", "cp2_tp2_sp", "pp2_tp2_sp", "fsdp2_pp2_interleaved1f1b")


class Remembering(TopKRouter):
    """A custom router that remembers the tokens of its experts in all steps."""

    class Config(TopKRouter.Config):
        pass

    def __init__(self, config: TopKRouter.Config, *, dim: int) -> None:
        super().__init__(config, dim=dim)
        self.register_buffer("remembered", torch.zeros(config.num_experts, dtype=torch.float64))

    def update(self, counts_E: torch.Tensor) -> None:
        super().update(counts_E)
        self.remembered += counts_E

    def initializers(self) -> dict[str, Any]:
        return super().initializers() | {"remembered": Constant.Config(value=0.0).build()}


def balanced_moe(**router: Any) -> MoE.Config:
    """Sigmoid, groups, a bias and a shared expert, as DeepSeek-V3 has them, and both losses of routers."""
    options: dict[str, Any] = {
        "num_experts": 8,
        "top_k": 3,
        "score": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "groups": ExpertGroups.Config(num_groups=4, num_kept=2, score="sum of best two"),
        "balancing": BalancingBias.Config(rate=0.02),
        "auxiliary_losses": [LoadBalancingLoss.Config(weight=0.1), ZLoss.Config(weight=0.01)],
    }
    return MoE.Config(
        router=Remembering.Config(**{**options, **router}),
        experts=SwiGLUExperts.Config(hidden_dim=16),
        shared=SwiGLU.Config(hidden_dim=16),
    )


def small(feed_forward: FeedForward.Config | None = None) -> Decoder.Config:
    config = qwen3_moe_debug()
    config.dim, config.num_layers, config.vocab_size, config.rope.dim = 32, 4, 64, 8
    attention = config.block.attention
    attention.num_heads, attention.num_kv_heads, attention.head_dim = 4, 2, 8
    config.block.feed_forward.experts.hidden_dim = 16
    if feed_forward is not None:
        config.block.feed_forward = feed_forward
    return config


def build_of(config: Decoder.Config) -> Callable[[], Decoder]:
    def build() -> Decoder:
        model = config.build()
        model.init_weights(0)
        return model

    return build


FEW = ("fsdp2", "tp2_sp", "cp2_ulysses", "pp2", "pp2_zbvzerobubble")
ALL = (*TWO_RANKS, *ZERO_BUBBLE, *FOUR_RANKS)


@pytest.mark.parametrize("names", [FEW, pytest.param(ALL, marks=pytest.mark.full)], ids=["few", "all"])
def test_counts_and_biases_are_those_of_one_process_on_any_mesh(names: tuple[str, ...]) -> None:
    """Every token once: the router remembers the counts, and the check compares what it remembers.

    Gradients too, with those of the losses that routers have.
    """
    report = check_parallel(build_of(small(balanced_moe())), meshes(*names), steps=2)
    assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_qwen3_is_the_same_on_any_mesh(experts: bool) -> None:
    moe = None if experts else SwiGLU.Config(hidden_dim=48)
    report = check_parallel(build_of(small(moe)), meshes(*ALL), steps=1)
    assert report.ok, report


RECOMPUTATIONS = {
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
    "every_2nd": PeriodicActivationCheckpoint.Config(n=2),
}


@pytest.mark.parametrize(
    "recomputation", ["full", *(pytest.param(n, marks=pytest.mark.full) for n in ("selective", "every_2nd"))]
)
def test_recomputation_counts_nothing_twice(recomputation: str) -> None:
    report = check_parallel(
        build_of(small(balanced_moe())),
        meshes("fsdp2", "pp2"),
        steps=1,
        activation_checkpoint=RECOMPUTATIONS[recomputation],
    )
    assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize(
    "recomputation",
    [None, FullActivationCheckpoint.Config(), SelectiveActivationCheckpoint.Config()],
    ids=["kept", "recomputed", "selectively"],
)
def test_compiled_blocks_count_too(recomputation: Any) -> None:
    compiled = Compile.Config(backend="aot_eager")
    options = {"compile": compiled, "activation_checkpoint": recomputation}
    report = check_parallel(build_of(small(balanced_moe())), meshes("fsdp2", "tp2_sp"), steps=2, **options)
    assert report.ok, report


def count_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: StepCounter, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            before = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
            self.leaf.grad = before.detach() + numbers
        return x

    monkeypatch.setattr(StepCounter, "forward", forward)


def count_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    local_counts = StepStatistics.local_counts
    monkeypatch.setattr(StepStatistics, "local_counts", lambda self: local_counts(self) * (dist.get_rank() == 0))


def count_micro_batches_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last one is left."""
    monkeypatch.setattr(StepCounter, "forward", lambda self, x, numbers: _Overwriting.apply(x, self, numbers))


class _Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step_counter: StepCounter, numbers: torch.Tensor) -> torch.Tensor:
        ctx.step_counter, ctx.numbers = step_counter, numbers.double()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.step_counter.leaf.grad = ctx.numbers
        return gradient, None, None


@pytest.mark.parametrize(
    "sabotage",
    [count_in_the_forward, count_on_one_rank, pytest.param(count_micro_batches_anew, marks=pytest.mark.full)],
)
def test_wrong_counts_are_noticed(monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., None]) -> None:
    sabotage(monkeypatch)
    build, recomputed = build_of(small(balanced_moe())), FullActivationCheckpoint.Config()
    report = check_parallel(build, meshes("fsdp2"), steps=1, activation_checkpoint=recomputed)
    assert "remembered" in str(report), report


def test_losses_of_a_wrong_weight_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    divided_by = AuxiliaryLosses.divided_by

    def by_too_much(self: AuxiliaryLosses, denominator: float) -> Any:
        return divided_by(self, denominator * (2 if dist.is_initialized() else 1))  # not in the one process

    monkeypatch.setattr(AuxiliaryLosses, "divided_by", by_too_much)
    report = check_parallel(build_of(small(balanced_moe())), meshes("fsdp2"), steps=1)
    assert "router.weight" in str(report), report


MESHES_OF_RUNS = {
    "FSDP 2": (2, {}),
    "TP 2": (2, {"tensor_parallel_degree": 2}),
    "CP 2": (2, {"context_parallel_degree": 2}),
    "PP 2": (2, {"pipeline_parallel_degree": 2}),
    "PP 2 ZBV": (2, {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"}),
    "HSDP 2x2": (4, {"data_parallel_replicate_degree": 2}),
    "PP 2 x FSDP 2": (4, {"pipeline_parallel_degree": 2}),
    "FSDP 2 x TP 2": (4, {"tensor_parallel_degree": 2}),
}


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[pytest.mark.full] * (mesh != "PP 2 ZBV")) for mesh in MESHES_OF_RUNS]
)
def test_runs_have_the_same_losses_loads_and_biases(
    small_run: Any, run_ranks: Any, balanced_experts: Any, mesh: str
) -> None:
    world_size, parallelism = MESHES_OF_RUNS[mesh]
    changes = {"model": balanced_experts, "training.local_batch_size": 1, "training.steps": 10}
    one = small_run("one", changes)
    many = small_run("many", changes | {f"parallelism.{name}": value for name, value in parallelism.items()})

    def run(config: Any) -> dict[str, list[float]]:
        trainer = config.build()
        trainer.train()
        state = trainer.parts["model"].state_dict()
        return {name: bias.tolist() for name, bias in state.items() if name.endswith("balancing.bias")}

    (biases,) = run_ranks(1, run, one)
    found = run_ranks(world_size, run, many)
    assert {name: bias for rank in found for name, bias in rank.items()} == biases
    assert all(rank[name] == biases[name] for rank in found for name in rank)
    assert len(biases) == 4
    assert all(any(bias) for bias in biases.values())
    for record, expected in zip(records(many), records(one), strict=True):
        # over 20 steps rounding of fp32 shows 1e-6, a row lost or repeated 1e-3 and more
        assert record["loss"] == pytest.approx(expected["loss"], rel=3e-5)
        assert record["expert_load"] == expected["expert_load"] > 1


def records(config: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.dump_folder / "metrics.jsonl").read_text().splitlines()]


def test_replicas_are_counted_too(run_ranks: Any) -> None:
    """What sums gradients over replicas sums the counts as well: here a hook that doubles stands for two of them."""

    def double(tensor: torch.Tensor) -> None:
        tensor.mul_(2)

    def counted() -> list[float]:
        model = build_of(small(balanced_moe()))()
        parallel = parallelize(model, model.roles(), ParallelDims.Config().build(world_size=1, device_type="cpu"))
        parallel.set_gradient_hook(double)
        parallel.forward_backward([Rows()], loss, 16.0)
        parallel.after_step()
        router: Any = model.layers[0].feed_forward.router
        return router.remembered.tolist()

    assert sum(run_ranks(1, counted)[0]) == 2 * 16 * 3


def test_a_step_that_is_not_made_is_forgotten(run_ranks: Any) -> None:
    """Gradients that are not used, and evaluations, leave no trace in what the next step counts."""

    def counted() -> tuple[list[float], list[float], dict[str, float]]:
        model, batches = build_of(small(balanced_moe()))(), [Rows(), Rows()]
        dims = ParallelDims.Config().build(world_size=1, device_type="cpu")
        parallel = parallelize(model, model.roles(), dims)
        router: Any = model.layers[0].feed_forward.router
        parallel.forward_backward(batches, loss, 32.0)
        parallel.evaluate(batches, loss)
        before = router.remembered.tolist()
        parallel.forward_backward(batches, loss, 32.0)
        measured = parallel.after_step()
        return before, router.remembered.tolist(), measured

    (before, after, measured) = run_ranks(1, counted)[0]
    assert before == [0] * 8
    assert sum(after) == 2 * 16 * 3
    assert list(measured) == ["expert_load"]
    assert measured["expert_load"] >= max(after) / (sum(after) / 8)


def test_a_loop_of_somebodys_own_balances_in_one_line(run_ranks: Any) -> None:
    """On ranks, and with the model alone."""

    def by_hand() -> list[float]:
        model, batch = build_of(small(balanced_moe()))(), Rows()
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        parallel = parallelize(model, model.roles(), dims)
        model.scale_auxiliary_losses(1.0)
        model(**batch.inputs).logsumexp(-1).sum().backward()
        parallel.after_step()
        router: Any = model.layers[0].feed_forward.router
        return router.remembered.tolist()

    model = build_of(small(balanced_moe()))()
    model.scale_auxiliary_losses(1.0)
    for _ in range(2):
        model(**Rows().inputs).logsumexp(-1).sum().backward()
    with torch.no_grad():
        model(**Rows().inputs)
    model.after_step()
    router: Any = model.layers[0].feed_forward.router
    assert run_ranks(2, by_hand) == [router.remembered.tolist()] * 2
    model.after_step()
    assert sum(router.remembered) == 2 * 16 * 3


@pytest.mark.parametrize("degrees", [{"tensor_parallel_degree": 2}, {}], ids=["tp2", "fsdp2"])
def test_losses_of_routers_weigh_the_same_in_a_loop_of_somebodys_own(run_ranks: Any, degrees: dict[str, int]) -> None:
    def by_hand() -> bool:
        model, batch = build_of(small(balanced_moe()))().double(), Rows()
        dims = ParallelDims.Config(**degrees).build(world_size=2, device_type="cpu")
        parallel = parallelize(model, model.roles(), dims)
        parallel.forward_backward([batch], loss, 16.0 * dims.dp_size)
        expected = full_gradients(model)
        model.zero_grad()
        model.scale_auxiliary_losses(1 / 16)
        (cross_entropy(model(**batch.inputs), batch.targets["labels"]) / 16).backward()
        check_same_gradients(full_gradients(model), expected)
        return True

    assert run_ranks(2, by_hand) == [True, True]


class Rows:
    """A row of 16 tokens."""

    def __init__(self) -> None:
        positions = torch.arange(16)[None]
        self.inputs = {"tokens": positions * 7 % 64, "positions": positions}
        self.targets = {"labels": positions * 5 % 64}
        self.sequence_dims = {"tokens": 1, "positions": 1, "labels": 1}


def loss(head: Any, hidden: torch.Tensor, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return cross_entropy(head(hidden), targets["labels"]), (targets["labels"] != -100).sum()
