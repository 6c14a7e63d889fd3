"""Pipelined evaluation: forward only; each rank runs its stages in order, each on all micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan_parallel.pipeline_parallel.partition import Stages
from titan_parallel.pipeline_parallel.shape_probe import Shape
from titan_parallel.pipeline_parallel.stage_runner import StageRunner


@torch.no_grad()
def forward_only(runner: StageRunner, stages: Stages, shapes: Sequence[Shape]) -> None:
    """Run the forward of all stages on micro-batches whose hidden states have these `shapes`."""
    group = stages.dims.pp_mesh.get_group()
    ranks = [dist.get_global_rank(group, rank) for rank in stages.schedule.ranks]
    kept: dict[int, list[Tensor]] = {}
    sends = []
    for stage in stages.mine:
        if stage == 0:
            hidden_states: Iterator[Tensor | None] = iter([None] * len(shapes))
        elif stage in kept:
            hidden_states = iter(kept.pop(stage))
        else:
            hidden_states = _receive(shapes, ranks[stage - 1], group, stages.dims.device_type)
        for number, hidden in enumerate(hidden_states):
            output = runner.run(stage, number, hidden)
            if stage + 1 in stages.mine:
                kept.setdefault(stage + 1, []).append(output)
            elif stage + 1 < len(ranks):
                sends.append((dist.isend(output, ranks[stage + 1], group), output))
    for work, _ in sends:
        if work is not None:
            work.wait()


def _receive(shapes: Sequence[Shape], rank: int, group: dist.ProcessGroup, device_type: str) -> Iterator[Tensor]:
    """Yield the hidden states that `rank` sends.

    All receives are posted before any send, because messages between two ranks arrive in the order of posting.
    """
    hidden_states = [torch.empty(shape, dtype=dtype, device=device_type) for shape, dtype in shapes]
    arrivals = [dist.irecv(hidden, rank, group) for hidden in hidden_states]
    for hidden, arrival in zip(hidden_states, arrivals, strict=True):
        if arrival is not None:
            arrival.wait()
        yield hidden
