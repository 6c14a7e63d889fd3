"""Evaluation over the stages of a pipeline: forward only, one stage after the other, on all micro-batches."""

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
    """Run micro-batches, whose streams have these `shapes`, through all stages."""
    group = stages.dims.pp_mesh.get_group()
    ranks = [dist.get_global_rank(group, rank) for rank in stages.schedule.ranks]
    kept: dict[int, list[Tensor]] = {}
    sends = []
    for stage in stages.mine:
        if stage == 0:
            streams: Iterator[Tensor | None] = iter([None] * len(shapes))
        elif stage in kept:
            streams = iter(kept.pop(stage))
        else:
            streams = _receive(shapes, ranks[stage - 1], group, stages.dims.device_type)
        for number, stream in enumerate(streams):
            output = runner.run(stage, number, stream)
            if stage + 1 in stages.mine:
                kept.setdefault(stage + 1, []).append(output)
            elif stage + 1 < len(ranks):
                sends.append((dist.isend(output, ranks[stage + 1], group), output))
    for work, _ in sends:
        if work is not None:
            work.wait()


def _receive(shapes: Sequence[Shape], rank: int, group: dist.ProcessGroup, device_type: str) -> Iterator[Tensor]:
    """The streams from a rank; all receives are posted at once, before sends: messages of two ranks have one order."""
    streams = [torch.empty(shape, dtype=dtype, device=device_type) for shape, dtype in shapes]
    arrivals = [dist.irecv(stream, rank, group) for stream in streams]
    for stream, arrival in zip(streams, arrivals, strict=True):
        if arrival is not None:
            arrival.wait()
        yield stream
