"""The same run on any mesh: gradients, norm and losses equal those of a plain loop in one process, on every rank."""

from __future__ import annotations

import copy
import shutil
import traceback
from dataclasses import dataclass

import pytest
import torch
from titan_parallel import (
    Compile,
    FullActivationCheckpoint,
    MixedPrecision,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
)
from titan_parallel.check.tolerances import MULTIPLE
from titan_parallel.testing import full_gradients
from torch.nn import functional as F

RECOMPUTATIONS = {
    "keep": None,
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
    "every_2nd": PeriodicActivationCheckpoint.Config(n=2),
}


@dataclass(frozen=True)
class Case:
    mesh: str
    recomputation: str = "keep"
    dtype: torch.dtype = torch.float64
    micro_batches: int = 1
    vocab: int = 64
    tied: bool = False
    backend: str | None = None

    def __str__(self) -> str:
        words = [self.mesh, self.recomputation, str(self.dtype).removeprefix("torch."), f"{self.micro_batches}mb"]
        return "-".join(words + [f"v{self.vocab}"] + ["tied"] * self.tied + [self.backend] * (self.backend is not None))


MESHES = ["one", "fsdp2", "ddp2", "tp2", "tp2_loss", "tp2_sequence", "tp2_both", "fsdp4", "hsdp2x2", "fsdp2_tp2"]
CASES = [
    *(Case(mesh, recomputation) for mesh in MESHES for recomputation in RECOMPUTATIONS),
    *(Case(mesh, "full", torch.float32, micro_batches=2) for mesh in MESHES),
    *(Case(mesh, "selective", tied=True, micro_batches=2) for mesh in [*MESHES, "fsdp2_once", "fsdp2_tp2_once"]),
    *(Case(mesh, "full", vocab=61, tied=tied) for mesh in ("tp2", "tp2_both", "fsdp2_tp2") for tied in (False, True)),
    Case("ddp2_tp2", "every_2nd", torch.float32, tied=True),
    Case("fsdp2", "keep", backend="aot_eager"),
    Case("tp2_both", "full", backend="aot_eager"),
    Case("tp2_sequence", "selective", backend="aot_eager"),
    Case("tp2_loss", "keep", torch.float32, backend="inductor"),
]


def gradients_equal(small, case: Case) -> None:
    model = small.make_model(small.Shape(vocab=case.vocab, tied=case.tied), case.dtype)
    names = [name for name, _ in model.named_parameters()]
    batch = small.make_batch(vocab=case.vocab)
    reference = small.refer(model, batch, case.dtype)
    compiler = Compile.Config(backend=case.backend) if case.backend else None
    parallel = small.put_on(
        case.mesh, model, activation_checkpoint=RECOMPUTATIONS[case.recomputation], compile=compiler
    )
    batches = small.micro_batches(batch, parallel.dims, case.micro_batches)
    for _ in range(2):  # gradients are set, not added up
        loss = parallel.forward_backward(batches, small.chunked_loss, reference.count)
    assert [name for name, _ in model.named_parameters()] == names
    reference.check_gradients(full_gradients(model))
    reference.check_loss(loss)
    reference.check_norm(parallel.clip_grad_norm_(0.25))
    reference.check_gradients(full_gradients(model), scale=0.25 / (float(reference.norm) + 1e-6))


def tried(small, cases: list[Case]) -> list[str]:
    """For each case "", or what went wrong on this rank."""
    outcomes = []
    for case in cases:
        try:
            gradients_equal(small, case)
            outcomes.append("")
        except Exception:
            outcomes.append(traceback.format_exc())
    return outcomes


@pytest.fixture(scope="module")
def outcomes(request, run_ranks, small) -> dict[Case, list[str]]:
    """What each rank says of each case that is asked for; ranks are started once for each number of them."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {each["case"] for each in parameters if isinstance(each.get("case"), Case)}
    said = {}
    for num_ranks in (1, 2, 4):
        cases = [case for case in CASES if case in asked and small.MESHES[case.mesh][0] == num_ranks]
        said |= dict(zip(cases, zip(*run_ranks(num_ranks, tried, small, cases), strict=True), strict=True))
    return said


def by_default(case: Case) -> bool:
    """Each mesh with two of the four kinds of recomputation, and all that is special but inductor, a minute of g++."""
    place = MESHES.index(case.mesh) + list(RECOMPUTATIONS).index(case.recomputation) if case.mesh in MESHES else 0
    return case.backend != "inductor" and (place % 2 == 0 or case != Case(case.mesh, case.recomputation))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.full] * (not by_default(case))) for case in CASES]
)
def test_gradients_norm_and_loss_equal_the_plain_loop(outcomes, case):
    if case.backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    assert set(outcomes[case]) == {""}


def plain_losses(model, batches, dtype) -> list[float]:
    """Of AdamW on the model's weights as they are stored, computed in `dtype`."""
    model = copy.deepcopy(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for batch in batches:
        computed = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
        logits = torch.func.functional_call(model, computed, (), batch.inputs)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets["labels"].flatten())
        loss.backward()
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def parallel_losses(small, mesh, batches, mixed_precision=None) -> list[float]:
    parallel = small.put_on(mesh, small.make_model(dtype=torch.float32), mixed_precision=mixed_precision)
    optimizer, losses = torch.optim.AdamW(parallel.model.parameters(), lr=3e-3), []
    for batch in batches:
        count = int((batch.targets["labels"] != -100).sum())
        parts = small.micro_batches(batch, parallel.dims, 2)
        losses.append(float(parallel.forward_backward(parts, small.chunked_loss, count)) / count)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
    return losses


def farthest(losses, expected) -> float:
    """In the units of the losses."""
    return max(abs(loss - wanted) for loss, wanted in zip(losses, expected, strict=True))


def exact_losses_and_rounding(small, batches, dtype) -> tuple[list[float], float]:
    """The losses in fp64, and how far those of the plain loop in `dtype` come from them in some orders of rows."""
    model = small.make_model(dtype=torch.float32)
    exact = plain_losses(model.double(), batches, torch.float64)
    model = small.make_model(dtype=torch.float32)
    turned = ([batch.turned(count) for batch in batches] for count in (0, 1, 4))
    return exact, max(farthest(plain_losses(model, each, dtype), exact) for each in turned)


def test_losses_of_20_steps_equal_the_plain_loop(run_ranks, small):
    batches = [small.make_batch(seed=seed) for seed in range(20)]
    exact, rounding = exact_losses_and_rounding(small, batches, torch.float32)
    assert exact[-1] < exact[0]
    assert rounding < 1e-4
    for mesh in ("fsdp2_tp2", "hsdp2x2"):
        for losses in run_ranks(4, parallel_losses, small, mesh, batches):
            assert farthest(losses, exact) <= MULTIPLE * rounding


def test_bf16_losses_are_close_on_any_mesh(run_ranks, small):
    batches = [small.make_batch(seed=seed) for seed in range(8)]
    exact, rounding = exact_losses_and_rounding(small, batches, torch.bfloat16)
    assert rounding < 0.05
    for mesh in ("one", "fsdp2", "tp2_both", "fsdp2_tp2"):
        world_size = small.MESHES[mesh][0]
        losses = run_ranks(world_size, parallel_losses, small, mesh, batches, MixedPrecision.Config())[0]
        assert rounding / MULTIPLE <= farthest(losses, exact) <= MULTIPLE * rounding  # rounds, and by no more
