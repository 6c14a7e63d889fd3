"""Tied weights of a pipeline: the gradient of a weight held by several ranks is the sum of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel._torch.distributed import has_no_memory
from titan_parallel.pipeline_parallel.partition import Stages
from titan_parallel.step.grad_norm import local

_BUCKET_NUMEL = 2**24
"""The number of elements after which a bucket of gradients, summed in one collective, is full."""


@torch.no_grad()
def sum_over_holders(model: nn.Module, stages: Stages) -> None:
    """Sum the gradients of each weight over the ranks that hold it, bitwise equal on all of these ranks."""
    parameters = dict(model.named_parameters())
    group = stages.dims.pp_mesh.get_group()

    def trained(names: Sequence[str]) -> list[nn.Parameter]:
        return [parameters[name] for name in names if parameters[name].requires_grad]

    for some in _buckets(trained(stages.held_by_all)):
        _sum_over_all(some, group)
    if of_ends := trained(stages.held_by_ends):
        first, last = stages.schedule.ranks[0], stages.schedule.ranks[-1]
        other = dist.get_global_rank(group, last if stages.rank == first else first)
        _sum_of_two(of_ends, other, group)


def _sum_over_all(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum gradients in one collective. Any stage may have no gradient of a weight; zeros take its place."""
    parts = [_gradient_or_zeros(parameter) for parameter in parameters]
    sums = torch.cat([*(part.flatten() for part in parts), _has_gradients(parameters)])
    dist.all_reduce(sums, group=group)
    *values, holders = sums.split([*(part.numel() for part in parts), len(parts)])
    _set_gradients(parameters, values, holders)


def _sum_of_two(parameters: Sequence[nn.Parameter], other: int, group: dist.ProcessGroup) -> None:
    """Exchange gradients and add: two-operand addition is commutative, so both ranks get bitwise equal sums."""
    mine = [*map(_gradient_or_zeros, parameters), _has_gradients(parameters)]
    theirs = [torch.empty_like(tensor) for tensor in mine]
    exchange = [
        operation
        for sent, received in zip(mine, theirs, strict=True)
        for operation in (dist.P2POp(dist.isend, sent, other, group), dist.P2POp(dist.irecv, received, other, group))
    ]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    *values, holders = (received.add_(sent) for sent, received in zip(mine, theirs, strict=True))
    _set_gradients(parameters, values, holders)


def _gradient_or_zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad).contiguous()


def _has_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return a tensor with 1 for each parameter that has a gradient on this rank, else 0."""
    return local(parameters[0]).new_tensor([parameter.grad is not None for parameter in parameters])


def _set_gradients(parameters: Sequence[nn.Parameter], values: Sequence[Tensor], holders: Tensor) -> None:
    """Set the gradients to `values`, except where no rank has one; `holders` counts the ranks with a gradient."""
    if any(parameter.grad is None for parameter in parameters):
        anywhere = [True] * len(parameters) if has_no_memory(holders) else (holders > 0).tolist()
        for parameter, has in zip(parameters, anywhere, strict=True):
            if parameter.grad is None and has:
                parameter.grad = torch.zeros_like(parameter)
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient.copy_(value.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield buckets of adjacent parameters of one dtype; the buckets are the same on every rank of a pipeline."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or sum(p.numel() for p in bucket) > _BUCKET_NUMEL):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
