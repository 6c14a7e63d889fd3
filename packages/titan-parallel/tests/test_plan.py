"""A plan says what a real run then holds and sends; judged by counting in runs on gloo, with code of the tests' own."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
import torch.distributed as dist
from titan_parallel import EveryNthBlock, FullRecompute, MixedPrecision, ParallelDims, Plan, SelectiveRecompute, plan
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECOMPUTATIONS = {
    "none": None,
    "full": FullRecompute.Config(),
    "selective": SelectiveRecompute.Config(),
    "every_2nd": EveryNthBlock.Config(n=2),
}
SHAPE = {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 96, "vocab": 128}
LENGTH, ROWS, NUM_BATCHES = 32, 4, 3


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adamw(named_parameters):
    return torch.optim.AdamW([p for _, p in named_parameters], lr=1e-3)


def planned(small, mesh="one", *, rank=None, optimizer=adamw, **options) -> Plan:
    world_size, degrees = small.MESHES[mesh]
    return plan(
        lambda: small.Transformer(small.Shape(**SHAPE)),
        roles=small.ROLES,
        batch=small.make_batch(rows=ROWS, length=LENGTH),
        num_batches=NUM_BATCHES,
        loss=small.chunked_loss,
        optimizer=optimizer,
        world_size=world_size,
        parallelism=ParallelDims.Config(**degrees),
        rank=rank,
        **options,
    )


class Counted(TorchDispatchMode):
    """Collectives of more than one rank, and the bytes of their larger side; independent of what plans count with."""

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
    """The bytes of storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (weakref.ref(storage, self._ended(storage._cdata)), storage.nbytes())
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _ended(self, key):
        def end(_):
            self.now -= self.alive.pop(key)[1]

        return end


def real_step(small, mesh, options):
    """A step on gloo: bytes of weights, gradients, optimizer state; collectives."""
    dims = small.make_dims(mesh)
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
    return sizes, counted.calls, counted.bytes, dims.mesh.get_coordinate()


def collectives_of(stage, mesh, small):
    """What the plan says, by kind and number of ranks, as `Counted` counts."""
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


def check_against_gloo(small, run_ranks, meshes, options=None):
    options = options or {}
    world_size = small.MESHES[meshes[0]][0]
    ranks = run_ranks(world_size, lambda: [real_step(small, mesh, options) for mesh in meshes])
    for number, mesh in enumerate(meshes):
        for rank in range(world_size):
            sizes, calls, nbytes, _ = ranks[rank][number]
            stage = planned(small, mesh, rank=rank, **options).stages[0]
            assert [stage.parameters, stage.gradients, stage.optimizer] == sizes, mesh
            assert collectives_of(stage, mesh, small) == (calls, nbytes), mesh


def test_sizes_and_collectives_are_those_of_a_run_on_two_ranks(small, run_ranks):
    check_against_gloo(small, run_ranks, ["fsdp2", "ddp2", "tp2", "tp2_both"])


def test_sizes_and_collectives_are_those_of_a_run_on_four_ranks(small, run_ranks):
    check_against_gloo(small, run_ranks, ["hsdp2x2", "fsdp2_tp2"])


def test_sizes_and_collectives_are_those_of_a_run_in_bf16(small, run_ranks):
    options = {"mixed_precision": MixedPrecision.Config(), "activation_checkpoint": SelectiveRecompute.Config()}
    check_against_gloo(small, run_ranks, ["fsdp2"], options)
