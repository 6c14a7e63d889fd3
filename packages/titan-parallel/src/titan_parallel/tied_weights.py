"""Weights that the first and the last stage of a pipeline share, on two ranks: one gradient, the sum of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel.gradient_norm import local

if TYPE_CHECKING:
    from titan_parallel.stages import Stages


@torch.no_grad()
def sum_over_ends(model: nn.Module, stages: Stages) -> None:
    """Add the other end's gradients to this rank's: the same bits on both, as a sum of two does not know its order."""
    first, last = stages.schedule.ranks[0], stages.schedule.ranks[-1]
    if not stages.tied_over_ranks or stages.rank not in (first, last):
        return
    group = stages.dims.pp_mesh.get_group()
    other = dist.get_global_rank(group, last if stages.rank == first else first)
    gradients = tied_gradients(model, stages.tied_over_ranks)
    theirs = [torch.empty_like(gradient) for gradient in gradients]
    exchange = [
        operation
        for mine, their in zip(gradients, theirs, strict=True)
        for operation in (dist.P2POp(dist.isend, mine, other, group), dist.P2POp(dist.irecv, their, other, group))
    ]
    if exchange:
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
    for mine, their in zip(gradients, theirs, strict=True):
        mine.add_(their)


def tied_gradients(model: nn.Module, names: list[str]) -> list[Tensor]:
    """This rank's parts of the gradients of tied weights."""
    parameters = dict(model.named_parameters())
    return [local(gradient) for name in names if (gradient := parameters[name].grad) is not None]
