"""A dry run gives the memory and communication of a real run, as counted in runs on gloo by separate code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from titan_config import ConfigError
from titan_parallel import (
    FullActivationCheckpoint,
    MixedPrecision,
    ParallelDims,
    PeriodicActivationCheckpoint,
    Plan,
    SelectiveActivationCheckpoint,
    cross_entropy,
    parallelize,
    plan,
)
from titan_parallel.planning.extrapolation import Extrapolator
from titan_parallel.planning.simulate import SimulatedStep
from titan_parallel.tensor_parallel.partial_gradients import PartialGradients
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

RECOMPUTATIONS = {
    "none": None,
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
    "every_2nd": PeriodicActivationCheckpoint.Config(n=2),
}
SHAPE = {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 96, "vocab": 128}
LENGTH, ROWS, NUM_BATCHES = 32, 4, 3


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sgd(named_parameters):
    return torch.optim.SGD([p for _, p in named_parameters])


def adamw(named_parameters):
    return torch.optim.AdamW([p for _, p in named_parameters], lr=1e-3)


def planned(small, mesh="one", shape=SHAPE, build=None, **options) -> Plan:
    world_size, degrees = small.MESHES[mesh]
    defaults = {
        "roles": small.ROLES,
        "batch": small.make_batch(rows=ROWS, length=LENGTH),
        "num_batches": NUM_BATCHES,
        "loss": small.chunked_loss,
        "optimizer": adamw,
        "world_size": world_size,
        "parallelism": ParallelDims.Config(**degrees),
    }
    return plan(build or (lambda: small.Transformer(small.Shape(**shape))), **defaults | options)


class Counted(TorchDispatchMode):
    """Counts collectives over more than one rank, and the bytes of their larger side; independent of the dry run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        name = str(function)
        kind = next((kind for kind in ("gather", "scatter", "reduce") if kind in name), None)
        if "c10d" in name and kind is not None:
            leaves = tree_leaves((args, result))
            texts = [leaf for leaf in leaves if isinstance(leaf, str)]
            groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            if texts:
                size = dist.distributed_c10d._resolve_process_group(texts[-1]).size()
            else:
                size = dist.ProcessGroup.unbox(groups[0]).size()
            if size > 1:
                self.calls[kind, size] += 1
                self.bytes[kind, size] += max(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


class Living(TorchDispatchMode):
    """Counts the bytes of live storages that operators allocated; `given` are storages to leave out."""

    def __init__(self, given) -> None:
        super().__init__()
        self.given, self.alive, self.peak = given, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        if "wait_tensor" in str(function):
            time.sleep(0.005)  # gloo's thread frees the sent tensors once it gets the GIL
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(
                leaf, FakeTensor
            ):  # DTensor propagates shapes with those
                storage = leaf.untyped_storage()
                if storage._cdata not in self.given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = weakref.ref(storage, self._ended(storage._cdata))
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Return the current bytes; FSDP resizes storages."""
        return sum(storage().nbytes() for storage in list(self.alive.values()) if storage() is not None)

    def _ended(self, key):
        return lambda _: self.alive.pop(key)


def real_step(small, mesh, options):
    """Run a step on gloo; return the bytes of weights, gradients and optimizer state, and the collectives."""
    parallel = small.put_on(mesh, small.make_model(small.Shape(**SHAPE), torch.float32), **options)
    optimizer = adamw(parallel.model.named_parameters())
    batches = [small.make_batch(rows=ROWS, length=LENGTH, seed=seed) for seed in range(NUM_BATCHES)]
    parallel.forward_backward(batches, small.chunked_loss, denominator=10)
    optimizer.step()
    with Counted() as counted:
        parallel.forward_backward(batches, small.chunked_loss, denominator=10)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
    with torch.no_grad():
        parameters = list(parallel.model.parameters())
        states = [value for state in optimizer.state.values() for value in state.values()]
        sizes = [
            sum(local(tensor).nbytes for tensor in tensors)
            for tensors in (parameters, [p.grad for p in parameters], states)
        ]
    return sizes, counted.calls, counted.bytes


def collectives_of(stage, mesh, small):
    """Return the collectives of the plan by (kind, number of ranks), as `Counted` counts."""
    _, degrees = small.MESHES[mesh]
    axes = {
        "tp": degrees.get("tensor_parallel_degree", 1),
        "dp_replicate": degrees.get("data_parallel_replicate_degree", 1),
    }
    axes["dp_shard"] = small.MESHES[mesh][0] // (axes["tp"] * axes["dp_replicate"])
    names = {"all_gather": "gather", "reduce_scatter": "scatter", "all_reduce": "reduce"}
    calls, sizes = Counter(), Counter()
    for entry in stage.collectives:
        size = 1
        for axis in entry.axis.split(" x "):
            size *= axes[axis]
        calls[names[entry.kind], size] += entry.calls
        sizes[names[entry.kind], size] += entry.bytes
    return calls, sizes


@pytest.fixture(scope="module")
def on_gloo(small, run_ranks):
    """{mesh: memory and communication of each rank in a real step}."""
    two, four = ["fsdp2", "ddp2", "tp2", "tp2_both"], ["hsdp2x2", "fsdp2_tp2"]
    seen = dict(
        zip(two, zip(*run_ranks(2, lambda: [real_step(small, mesh, {}) for mesh in two]), strict=True), strict=True)
    )
    seen |= zip(
        four, zip(*run_ranks(4, lambda: [real_step(small, mesh, {}) for mesh in four]), strict=True), strict=True
    )
    return seen


def check(stage, mesh, small, real):
    sizes, calls, nbytes = real
    assert [stage.parameters, stage.gradients, stage.optimizer] == sizes, mesh
    assert collectives_of(stage, mesh, small) == (calls, nbytes), mesh


FEW_MESHES = ("tp2_both", "fsdp2_tp2")


@pytest.mark.parametrize(
    "mesh", [*FEW_MESHES, *(pytest.param(m, marks=pytest.mark.full) for m in ("fsdp2", "ddp2", "tp2", "hsdp2x2"))]
)
def test_sizes_and_collectives_are_those_of_a_run_on_every_rank(small, on_gloo, mesh):
    for rank, real in enumerate(on_gloo[mesh]):
        check(planned(small, mesh, rank=rank).stages[0], mesh, small, real)


def test_sizes_and_collectives_are_those_of_a_run_in_bf16_with_activation_checkpointing(small, run_ranks):
    options = {
        "mixed_precision": MixedPrecision.Config(),
        "activation_checkpoint": SelectiveActivationCheckpoint.Config(),
    }
    real = run_ranks(2, lambda: real_step(small, "fsdp2", options))
    check(planned(small, "fsdp2", **options).stages[0], "fsdp2", small, real[0])


def test_a_missing_optimizer_state_or_collective_is_found(small, on_gloo, monkeypatch):
    def amsgrad(parameters):
        return torch.optim.AdamW([p for _, p in parameters], amsgrad=True)

    with pytest.raises(AssertionError, match="tp2_both"):
        check(planned(small, "tp2_both", optimizer=amsgrad).stages[0], "tp2_both", small, on_gloo["tp2_both"][0])
    monkeypatch.setattr(PartialGradients, "_sum", lambda self, model: None)
    with pytest.raises(AssertionError, match="tp2_both"):
        check(planned(small, "tp2_both").stages[0], "tp2_both", small, on_gloo["tp2_both"][0])


def held_on_one_rank(small, recomputation):
    model = small.make_model(small.Shape(**SHAPE), torch.float32)
    parallel = small.put_on("one", model, activation_checkpoint=recomputation)
    return held_in(parallel, small.make_batch(rows=ROWS, length=LENGTH), small.chunked_loss)


def held_in(parallel, batch, loss_of_step):
    """Run a real step; return the live bytes when the backward begins, the peak, and the bytes that autograd saved."""
    given = [*parallel.model.parameters(), *batch.inputs.values(), *batch.targets.values()]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    living, kept, saved = Living(known), [], {}

    def loss(head, hidden, targets):
        loss_sum, count = loss_of_step(head, hidden, targets)
        loss_sum.register_hook(lambda _: kept.append(living.now()))
        return loss_sum, count

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not kept and storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with living, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parallel.forward_backward([batch], loss, denominator=10)
    return kept[0], living.peak, sum(saved.values())


def test_activations_and_peaks_are_those_of_a_run_with_each_activation_checkpoint(small, on_one_rank):
    real = on_one_rank(lambda: {name: held_on_one_rank(small, kind) for name, kind in RECOMPUTATIONS.items()})
    for name, kind in RECOMPUTATIONS.items():
        stage = planned(small, num_batches=1, activation_checkpoint=kind).stages[0]
        kept, peak, saved = real[name]
        assert stage.activations == pytest.approx(kept, abs=64), name  # scalars
        assert sum(stage.at_peak.values()) == stage.peak
        batch = 3 * 8 * ROWS * LENGTH
        assert stage.peak - stage.parameters - stage.optimizer - batch == peak, name
        if name == "none":
            assert stage.activations == pytest.approx(saved, abs=64)


WIDE = SHAPE | {"vocab": 4096}
"""Most parameters are in the embedding, so that an unsharded embedding changes the peak."""


def peak_of_a_run(small, mesh) -> int:
    """Return the peak of a step with its optimizer, without weights, optimizer state and batches, in bytes."""
    model = small.make_model(small.Shape(**WIDE), torch.float32)
    parallel = small.put_on(mesh, model)
    optimizer = adamw(model.named_parameters())
    batches = [small.make_batch(rows=ROWS, length=LENGTH, seed=seed) for seed in range(NUM_BATCHES)]

    def step():
        parallel.forward_backward(batches, small.chunked_loss, denominator=10)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()

    step()
    model.zero_grad(set_to_none=True)
    states = [value for state in optimizer.state.values() for value in state.values()]
    given = [*model.parameters(), *states, *(t for b in batches for t in (*b.inputs.values(), *b.targets.values()))]
    with torch.no_grad():
        known = {local(tensor).untyped_storage()._cdata for tensor in given}
    with Living(known) as living:
        step()
    return living.peak


def test_peaks_are_those_of_a_run_on_ranks(small, run_ranks):
    two, four = ("fsdp2", "tp2", "tp2_both"), ("fsdp2_tp2", "fsdp2_tp2_once")
    real = run_ranks(2, lambda: {mesh: peak_of_a_run(small, mesh) for mesh in two})[0]
    real |= run_ranks(4, lambda: {mesh: peak_of_a_run(small, mesh) for mesh in four})[0]
    for mesh, peak in real.items():
        stage = planned(small, mesh, shape=WIDE).stages[0]
        given = stage.parameters + stage.optimizer + 3 * 8 * ROWS * LENGTH * NUM_BATCHES
        assert stage.peak - given == pytest.approx(peak, rel=0.05), mesh


def test_gradients_that_are_reduced_once_are_kept_unsharded(small):
    """With 6 micro-batches FSDP keeps unsharded gradients, twice the size of a rank's shard."""
    always, once = planned(small, "fsdp2", num_batches=6), planned(small, "fsdp2_once", num_batches=6)
    whole = 2 * always.stages[0].gradients
    assert once.peak - always.peak > 0.4 * whole
    calls = [{c.kind: c.calls for c in made.stages[0].collectives}["reduce_scatter"] for made in (always, once)]
    assert calls[0] == 6 * calls[1]


@pytest.mark.full
def test_reducing_gradients_in_each_micro_batch_is_suggested(small):
    always, once = planned(small, "fsdp2", num_batches=6), planned(small, "fsdp2_once", num_batches=6)
    tight = planned(small, "fsdp2_once", num_batches=6, device_memory=once.peak - 1)
    assert tight.suggestions[0].change == "fsdp_reduce_gradients always"
    assert tight.suggestions[0].peak == always.peak


@pytest.mark.full
@pytest.mark.parametrize(
    ("recomputation", "mesh"),
    [
        (None, "fsdp2_tp2"),
        (PeriodicActivationCheckpoint.Config(n=3), "fsdp2"),
        (FullActivationCheckpoint.Config(), "one"),
    ],
)
def test_equivalent_blocks_and_micro_batches_are_extrapolated(small, recomputation, mesh):
    options = {"shape": SHAPE | {"layers": 13}, "num_batches": 4, "activation_checkpoint": recomputation}
    short, long = planned(small, mesh, **options), planned(small, mesh, every_block=True, **options)
    assert short == long


@pytest.fixture
def removed_blocks(monkeypatch, tmp_path):
    """A file with one line for each change of a step: the blocks that are removed from the simulation."""
    path = tmp_path / "blocks"  # children append to it too
    changed = SimulatedStep.changed

    def recorded(self, **changes):
        with path.open("a") as file:
            file.write(f"{' '.join(changes.get('removed_blocks', ()))}\n")
        return changed(self, **changes)

    monkeypatch.setattr(SimulatedStep, "changed", recorded)
    return path


@dataclass(frozen=True)
class Gating:
    """A config whose fields are the only difference between layers; `weight_init` does not change a step."""

    function: str
    weight_init: float


def test_blocks_may_differ_in_their_configs_only(small, removed_blocks):
    """Every second block saves other tensors. Weight initialization does not make blocks different."""

    class Gated(small.FeedForward):
        def __init__(self, config):
            super().__init__(small.Shape(**SHAPE))
            self.config = config

        def forward(self, x):
            return self.down(getattr(F, self.config.function)(self.gate(x)) * self.up(x))

    def build():
        model = small.Transformer(small.Shape(**SHAPE | {"layers": 10}))
        for number, layer in enumerate(model.layers):
            layer.feed_forward = Gated(Gating("silu" if number % 2 else "relu", weight_init=0.02 / (1 + number)))
        return model

    short = planned(small, build=build, num_batches=2)
    removed = removed_blocks.read_text().splitlines()
    assert planned(small, build=build, num_batches=2, every_block=True) == short
    assert " ".join(f"layers.{number}" for number in range(6, 10)) in removed


def test_the_ends_of_a_stack_may_differ_from_its_middle(small, removed_blocks):
    """The first blocks and the last are wider. Roles name each block: those after removed blocks are renumbered."""
    each = [p.replace("layers.*", f"layers.{number}") for number in range(10) for p in small.ROLES]
    roles = {pattern: small.ROLES[re.sub(r"\.\d+", ".*", pattern)] for pattern in each}

    def build():
        model = small.Transformer(small.Shape(**SHAPE | {"layers": 10}))
        for number, width in {0: 64, 1: 64, 9: 32}.items():
            model.layers[number].feed_forward = small.FeedForward(small.Shape(**SHAPE | {"hidden": width}))
        return model

    def made(**options):
        return planned(small, "tp2_both", build=build, roles=roles, num_batches=2, **options)

    short = made()
    assert " ".join(f"layers.{number}" for number in range(6, 9)) in removed_blocks.read_text().splitlines()
    assert made(every_block=True) == short


def test_flops_are_those_of_the_flop_counter_of_torch(small):
    made = planned(small, num_batches=2)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model = small.Transformer(small.Shape(**SHAPE))
        model(**{name: tensor.to("meta") for name, tensor in small.make_batch(rows=ROWS, length=LENGTH).inputs.items()})
    assert made.flops.full_per_step == 3 * 2 * counter.get_total_flops()
    attention = 3 * 4 * LENGTH * SHAPE["width"] * SHAPE["layers"]
    assert made.flops.full_per_token - made.flops.causal_per_token == attention / 2


@pytest.mark.parametrize(
    ("kernel", "dtype", "recomputation"),
    [
        ("GroupedMM", torch.bfloat16, "selective"),
        ("GroupedMM", torch.float32, "none"),
        ("GroupedMM", torch.float64, "none"),
        ("ForLoop", torch.float32, "none"),
        ("ForLoop", torch.bfloat16, "selective"),
    ],
)
def test_memory_and_flops_of_experts_are_those_of_a_run(small, on_one_rank, kernel, dtype, recomputation):
    """For-loop experts read token counts, which fake tensors do not have. In fp64 the loop replaces grouped_mm."""
    moe = pytest.importorskip("titan_models.moe", reason="experts are in titan-models, which is not installed")
    from titan_models.qwen3 import qwen3_moe_debug

    config = qwen3_moe_debug()
    config.num_layers = 2
    config.block.feed_forward.experts.kernel = getattr(moe, kernel).Config()
    batch = small.make_batch(rows=ROWS, length=LENGTH)
    recomputed = {"activation_checkpoint": RECOMPUTATIONS[recomputation]}

    def loss(head, hidden, targets):
        return cross_entropy(head(hidden), targets["labels"]), (targets["labels"] != -100).sum()

    def build():
        return config.build().to(dtype)

    def held():
        model = build()
        model.init_weights(0)
        return held_in(parallelize(model, model.roles(), small.make_dims("one"), **recomputed), batch, loss)

    options = {"roles": None, "batch": batch, "loss": loss, "num_batches": 1, "optimizer": sgd}
    made = planned(small, build=build, **options, **recomputed)
    kept, peak, _ = on_one_rank(held)
    stage, flops = made.stages[0], config.flops_per_token(LENGTH)
    assert stage.activations == pytest.approx(
        kept, rel=1e-3
    )  # counts, and small tensors of a loop that depend on the torch release
    given = stage.parameters + stage.optimizer + 3 * 8 * ROWS * LENGTH
    assert stage.peak - given == pytest.approx(peak, rel=1e-3)  # squares for the gradient norm
    assert (made.flops.full_per_token, made.flops.causal_per_token) == (flops.full, flops.causal)


def test_a_plan_round_trips_through_json_and_says_if_it_fits(small):
    roomy = planned(small, "fsdp2", device_memory="1GiB")
    assert Plan.from_json(roomy.to_json()) == roomy
    assert roomy.fits and not roomy.suggestions and json.loads(roomy.to_json())["fits"] is True
    tight = planned(small, "fsdp2", device_memory=roomy.peak - 1)
    assert tight.fits is False
    assert tight.suggestions and tight.suggestions[-1].fits
    first = tight.suggestions[0]
    assert first.change == "activation_checkpoint SelectiveActivationCheckpoint"
    assert first.peak == planned(small, "fsdp2", activation_checkpoint=SelectiveActivationCheckpoint.Config()).peak
    assert "Does not fit" in str(tight) and first.change in str(tight)
    assert planned(small).fits is None


def test_a_rank_can_make_a_dry_run_of_a_larger_group(small, run_ranks):
    alone = planned(small, "fsdp4")

    def step_after_planning():
        made = planned(small, "fsdp4")
        total = torch.ones(1)
        dist.all_reduce(total)
        return made.to_json(), float(total)

    assert run_ranks(2, step_after_planning) == [(alone.to_json(), 2.0)] * 2


def test_a_pipeline_has_stages_and_a_bubble(small):
    made = planned(
        small, "one", world_size=2, parallelism=ParallelDims.Config(pipeline_parallel_degree=2), num_batches=8
    )
    assert made.bubble == pytest.approx(1 / 9)
    assert [stage.stage for stage in made.stages] == [0, 1]
    assert sum(stage.parameters for stage in made.stages) == planned(small).stages[0].parameters
    assert made.flops.full_per_token == planned(small).flops.full_per_token


def test_equivalent_stages_are_interpolated(small, monkeypatch, tmp_path):
    """Of 7 ranks, 2 are interpolated: their in-flight micro-batches lie between those of simulated ranks."""
    pipeline = ParallelDims.Config(pipeline_parallel_degree=7)
    options = {"world_size": 7, "parallelism": pipeline, "num_batches": 7, "shape": SHAPE | {"layers": 7}}
    simulated = tmp_path / "ranks"  # children append to it too
    record = Extrapolator.record

    def recorded(self, step, rank):
        with simulated.open("a") as file:
            file.write(f"{rank} ")
        return record(self, step, rank)

    monkeypatch.setattr(Extrapolator, "record", recorded)
    short = planned(small, **options)
    assert sorted(simulated.read_text().split()) == ["0", "1", "3", "5", "6"]
    simulated.unlink()
    assert planned(small, **options, every_block=True) == short
    assert sorted(simulated.read_text().split()) == ["0", "1", "2", "3", "4", "5", "6"]
    assert short.stages[2].peak >= short.stages[3].peak > short.stages[4].peak
    text = str(short)
    assert [line.split()[:2] for line in text.splitlines() if "  stage" in line] == [
        ["stage", str(i)] for i in range(7)
    ]
    fullest = max(short.stages, key=lambda stage: stage.peak)
    assert text.count("Collectives per rank") == text.count(f"stage {fullest.stage} (1 rank)") - 1 == 1


def test_wasteful_settings_give_warnings(small):
    over_nodes = planned(small, "fsdp2_tp2", ranks_per_node=1, device_memory="1GiB")
    assert any(line.startswith("Tensor parallel spans 2 nodes") for line in over_nodes.warnings)
    assert any("micro-batches of local_batch_size 4" in line for line in over_nodes.warnings)


@pytest.mark.parametrize("text", ["80", "80 gigs", "-1GiB", "0GiB", "", "nan GiB"])
def test_invalid_sizes_are_rejected(small, text):
    with pytest.raises(ConfigError, match=r"must be a number above 0 and a unit .*, got .* Write 80GiB or 141GB"):
        planned(small, device_memory=text)


def test_settings_that_parallelize_rejects_are_rejected(small):
    with pytest.raises(ConfigError, match=r"tensor_parallel_degree must divide the number of ranks \(4\), got 3"):
        planned(small, world_size=4, parallelism=ParallelDims.Config(tensor_parallel_degree=3))


def test_no_child_outlives_a_killed_dry_run():
    """Nor does a child of a child: all hold the pipe that the test reads to its end."""
    forever = """
import os, time
from titan_parallel.planning.child import run_in_child

def forever():
    print(os.getpid(), flush=True)
    time.sleep(600)

run_in_child(lambda: run_in_child(forever))
"""
    planning = subprocess.Popen([sys.executable, "-c", forever], stdout=subprocess.PIPE, text=True)
    innermost = int(planning.stdout.readline())
    planning.kill()
    try:
        planning.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.kill(innermost, signal.SIGKILL)
        raise
