"""Tokens a second and memory of a model put on its ranks by `parallelize`, beside the same model wrapped by hand.

By hand means `fully_shard` on each block, or torch's `parallelize_module`, and a loop in bare PyTorch. Blocks of steps
take turns in one process group. A rank has one thread.

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

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: ranks are forked

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
    """The same on every rank: tensor-parallel ranks share it."""
    rows = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    by_type: dict[type, list[nn.Parameter]] = {}  # torch's fused AdamW takes no DTensors among plain ones
    for parameter in model.parameters():
        by_type.setdefault(type(parameter.data), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in by_type.values()], lr=1e-3, fused=True)


def titan(**degrees: Any) -> Step:
    """Our step: forward, backward and optimizer."""
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
    """The same step in bare PyTorch."""
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
    """Each projection by itself, as torch's tutorial has it."""
    projections = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    projections |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    projections |= {"attention.wo": RowwiseParallel(), "feed_forward.w2": RowwiseParallel()}
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return by_hand(_with_plan(ends, projections))


def sequence_parallel() -> Step:
    """The stream split over the sequence between attention and feed-forward, the loss taken on split logits."""
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
    return by_hand(_with_plan(ends, projections), loss_parallel)


def _with_plan(ends: dict[str, Any], of_block: dict[str, Any]) -> nn.Module:
    model, mesh = Llama(), init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, ends)
    for block in model.blocks:
        parallelize_module(block, mesh, of_block)
    return model


def seconds(step: Step) -> tuple[float, float]:
    """Of a block of steps: on the clock, and of the processor, over all ranks."""
    dist.barrier()
    start, processor_start = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step()
    processor = torch.tensor(time.process_time() - processor_start, dtype=torch.float64)
    dist.all_reduce(processor)
    return time.perf_counter() - start, float(processor)


def alternate(ours: Callable[[], Step], theirs: Callable[[], Step]) -> list[tuple[tuple[float, float], ...]]:
    """Seconds of blocks of steps, pair by pair; who begins changes from pair to pair."""
    our_step, their_step = ours(), theirs()
    seconds(our_step), seconds(their_step)
    pairs = []
    for index in range(PAIRS):
        if index % 2:
            their_seconds, our_seconds = seconds(their_step), seconds(our_step)
        else:
            our_seconds, their_seconds = seconds(our_step), seconds(their_step)
        pairs.append((our_seconds, their_seconds))
    return pairs


def added_memory(make: Callable[[], Step]) -> float:
    """By how many MB two steps, and all they need, raise the peak of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds(make())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 of a fresh gloo group returns."""
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
        raise SystemExit(f"A rank ended with code {[process.exitcode for process in processes]}.")
    return receiver.recv()


def compare(
    name: str, num_ranks: int, rows: int, limit: float, ours: Callable[[], Step], theirs: Callable[[], Step]
) -> bool:
    """Measure steps of `rows` over all ranks, print, and say whether the median of the ratios is good enough.

    The processor's time is printed beside it: it says what the code costs where other work disturbs the clock.
    """
    pairs = on_ranks(num_ranks, alternate, ours, theirs)
    ratios = sorted(their_seconds / our_seconds for (our_seconds, _), (their_seconds, _) in pairs)
    of_processor = statistics.median(their_seconds / our_seconds for (_, our_seconds), (_, their_seconds) in pairs)
    speeds = [STEPS * rows * T / statistics.median(s for s, _ in column) for column in zip(*pairs, strict=True)]
    memory = [on_ranks(num_ranks, added_memory, make) for make in (ours, theirs)]
    print(
        f"{name}: titan {speeds[0]:.0f} tokens/s and {memory[0]:.0f} MB, by hand {speeds[1]:.0f} tokens/s and "
        f"{memory[1]:.0f} MB, ratio {statistics.median(ratios):.3f} (limit {limit}; {PAIRS} pairs, {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}), of processor time {of_processor:.3f}",
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
