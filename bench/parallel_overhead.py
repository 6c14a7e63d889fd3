"""Tokens per second and memory of a model under `parallelize`, compared to the same model wrapped by hand.

By hand means `fully_shard` on each block, or torch's `parallelize_module`, and a loop in plain PyTorch. Blocks of steps
of the two are interleaved in one process group. Each rank has one thread.

B batch, T tokens, D width, H heads, K head dim, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; forked ranks must not have an OpenMP thread pool

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sizes import TOY, sized
from titan_parallel import ParallelDims, cross_entropy, parallelize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

NUM_LAYERS, D, H, K, FEED_FORWARD, V = sized((6, 256, 8, 32, 768, 2048), (1, 32, 4, 8, 64, 128))
B, T = sized((2, 256), (2, 32))
PAIRS, STEPS = sized((9, 3), (1, 1))
Step = Callable[[], Any]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (w(x_BTD).unflatten(-1, (-1, K)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(D, FEED_FORWARD, bias=False) for _ in range(2))
        self.w2 = nn.Linear(FEED_FORWARD, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


ROLES = {
    "embedding": "embedding",
    "blocks.*": "block",
    "blocks.*.attention": "region",
    **{f"blocks.*.attention.{name}": ("colwise", {"num_heads": H}) for name in ("wq", "wk", "wv")},
    "blocks.*.attention.wo": "rowwise",
    "blocks.*.feed_forward": "region",
    **{f"blocks.*.feed_forward.{name}": "colwise" for name in ("w1", "w3")},
    "blocks.*.feed_forward.w2": "rowwise",
    "head": "head",
}


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens and labels `[B, T]`, the same on every rank, as tensor parallelism requires."""
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    by_type: dict[type, list[nn.Parameter]] = {}  # torch's fused AdamW cannot mix DTensors and plain tensors in a group
    for parameter in model.parameters():
        by_type.setdefault(type(parameter.data), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in by_type.values()], lr=1e-3, fused=True)


def titan(**degrees: Any) -> Step:
    """Return a step with `parallelize`: forward, backward and optimizer."""
    dims = ParallelDims.Config(**degrees).build(world_size=dist.get_world_size(), device_type="cpu")
    model = Llama()
    parallel = parallelize(model, ROLES, dims)
    optimizer, (tokens, labels) = optimizer_of(model), batch()
    micro_batch = SimpleNamespace(inputs={"tokens": tokens}, targets={"labels": labels}, sequence_dims={"tokens": 1})

    def loss(head: Any, hidden: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        return cross_entropy(head(hidden), targets["labels"]), torch.tensor(labels.numel())

    def step() -> None:
        parallel.forward_backward([micro_batch], loss, labels.numel() * dims.dp_size)
        optimizer.step()

    return step


def by_hand(model: nn.Module, around_loss: Any = nullcontext) -> Step:
    """Return the same step in plain PyTorch."""
    optimizer, (tokens, labels) = optimizer_of(model), batch()

    def step() -> None:
        with around_loss():
            F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fully_sharded() -> Step:
    model, mesh = Llama(), init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (*model.blocks, model.embedding):
        fully_shard(unit, mesh=mesh)
    for unit in (model.head, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    return by_hand(model)


def tensor_parallel() -> Step:
    """Return a step with each projection parallelized separately, as in torch's tutorial."""
    projections = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    projections |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    projections |= {"attention.wo": RowwiseParallel(), "feed_forward.w2": RowwiseParallel()}
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return by_hand(_parallelized(ends, projections))


def sequence_parallel() -> Step:
    """Return a step with sequence-parallel norms and hidden states, and the loss on vocabulary-sharded logits."""
    entry = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    projections = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    projections |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    projections |= {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.wo", "feed_forward.w2")}
    projections |= {"attention": entry, "feed_forward": entry}
    projections |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    return by_hand(_parallelized(ends, projections), loss_parallel)


def _parallelized(ends: dict[str, Any], of_block: dict[str, Any]) -> nn.Module:
    model, mesh = Llama(), init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, ends)
    for block in model.blocks:
        parallelize_module(block, mesh, of_block)
    return model


def seconds(step: Step) -> tuple[float, float]:
    """Return the wall-clock time of a block of steps, and the CPU time summed over ranks."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step()
    cpu_seconds = torch.tensor(time.process_time() - cpu_start, dtype=torch.float64)
    dist.all_reduce(cpu_seconds)
    return time.perf_counter() - start, float(cpu_seconds)


def alternate(ours: Callable[[], Step], baseline: Callable[[], Step]) -> list[tuple[tuple[float, float], ...]]:
    """Return pairs of seconds of blocks of steps; the order within a pair alternates."""
    our_step, baseline_step = ours(), baseline()
    seconds(our_step), seconds(baseline_step)
    pairs = []
    for index in range(PAIRS):
        if index % 2:
            baseline_seconds, our_seconds = seconds(baseline_step), seconds(our_step)
        else:
            our_seconds, baseline_seconds = seconds(our_step), seconds(baseline_step)
        pairs.append((our_seconds, baseline_seconds))
    return pairs


def added_memory(make: Callable[[], Step]) -> float:
    """Return the MB by which building the model and running a block of steps raise the peak of a new process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds(make())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` on every rank of a new gloo group and return the result of rank 0."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def main(rank: int) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder, "store")), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        result = function(*args)
        if rank == 0:
            sender.send(result)
        dist.barrier()

    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=main, args=(rank,), daemon=True) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"Ranks must exit with code 0, got {[process.exitcode for process in processes]}.")
    return receiver.recv()


def compare(
    name: str, num_ranks: int, batch_size: int, limit: float, ours: Callable[[], Step], baseline: Callable[[], Step]
) -> bool:
    """Measure steps of `batch_size` sequences over all ranks, print, and return whether the median ratio is in limits.

    The ratio of CPU times is printed, too; other load on the machine disturbs it less than the wall-clock time.
    """
    pairs = on_ranks(num_ranks, alternate, ours, baseline)
    ratios = sorted(baseline_seconds / our_seconds for (our_seconds, _), (baseline_seconds, _) in pairs)
    cpu_ratio = statistics.median(baseline_cpu / our_cpu for (_, our_cpu), (_, baseline_cpu) in pairs)
    speeds = [STEPS * batch_size * T / statistics.median(s for s, _ in column) for column in zip(*pairs, strict=True)]
    memory = [on_ranks(num_ranks, added_memory, make) for make in (ours, baseline)]
    print(
        f"{name}: titan {speeds[0]:.0f} tokens/s and {memory[0]:.0f} MB,\n"
        f"  by hand {speeds[1]:.0f} tokens/s and {memory[1]:.0f} MB, ratio {statistics.median(ratios):.3f}\n"
        f"  (limit {limit}; {PAIRS} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f}), of CPU time {cpu_ratio:.3f}",
        flush=True,
    )
    return statistics.median(ratios) >= limit


def main() -> None:
    plain = {"tensor_parallel_degree": 2, "sequence_parallel": False, "loss_parallel": False}
    results = [
        compare("FSDP, one rank", 1, B, 0.97, titan, fully_sharded),
        compare("FSDP, two ranks", 2, 2 * B, 0.97, titan, fully_sharded),
        compare("TP, two ranks", 2, B, 1.0, lambda: titan(**plain), tensor_parallel),
        compare("TP with SP, two ranks", 2, B, 1.0, lambda: titan(tensor_parallel_degree=2), sequence_parallel),
    ]
    sys.exit(not TOY and not all(results))


if __name__ == "__main__":
    main()
