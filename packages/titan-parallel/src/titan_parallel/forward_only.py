"""Evaluation over the stages of a pipeline: forward only, one stage after the other, on all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan_parallel.dims import ParallelDims
from titan_parallel.stage_runner import Shape, StageRunner
from titan_parallel.stages import Stages


@torch.no_grad()
def forward_only(runner: StageRunner, stages: Stages, shapes: Sequence[Shape], dims: ParallelDims) -> None:
    """Run micro-batches, whose streams have these `shapes`, through all stages.

    Receives are posted before sends, so that the order of messages between two ranks is the same on both.
    """
    group = dims.pp_mesh.get_group()
    ranks = [dist.get_global_rank(group, rank) for rank in stages.schedule.ranks]
    handed_over: dict[int, list[Tensor]] = {}
    sends = []
    for stage in stages.mine:
        received: list[Tensor | None] = [None] * len(shapes)
        arrivals = []
        if stage in handed_over:
            received = [*handed_over.pop(stage)]
        elif stage > 0:
            received = [torch.empty(shape, dtype=dtype, device=dims.device_type) for shape, dtype in shapes]
            arrivals = [dist.irecv(stream, ranks[stage - 1], group) for stream in received]
        for number in range(len(shapes)):
            if arrivals:
                arrivals[number].wait()
            output = runner.run(stage, number, received[number])
            received[number] = None
            if stage + 1 in stages.mine:
                handed_over.setdefault(stage + 1, []).append(output)
            elif stage + 1 < len(ranks):
                sends.append((dist.isend(output, ranks[stage + 1], group), output))
    for work, _ in sends:
        work.wait()
