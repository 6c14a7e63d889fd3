"""Partial gradients: the sum over tensor-parallel ranks, in the backward or at the end of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel._torch.distributed import all_reduce
from titan_parallel.step.grad_norm import local


class PartialGradients:
    """Sums the gradients of parameters with which each rank computes only for its own features or tokens.

    By default the backward sums them, with one all-reduce for each unit, so that a custom training loop finds complete
    gradients. Within `summed_at_the_end` they are summed once, for all units and micro-batches of a step.
    """

    def __init__(self, names: Sequence[str], group: dist.ProcessGroup) -> None:
        self.names = names
        self._group = group
        self._waits = False

    def summed_in_backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors unchanged; their gradients are summed over ranks, except within `summed_at_the_end`."""
        if self._waits or not torch.is_grad_enabled() or not tensors:
            return tensors
        return _SumGradients.apply(self._group.group_name, *tensors)

    @contextmanager
    def summed_at_the_end(self, model: nn.Module) -> Iterator[None]:
        """Leave partial gradients in `.grad` of the model's parameters, and sum them all on exit."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self._sum(model)

    @torch.no_grad()
    def _sum(self, model: nn.Module) -> None:
        """Sum the gradients with one all-reduce for each dtype.

        (Sums over mesh axes commute: these gradients have been summed over data-parallel ranks already.)
        """
        parameters = dict(model.named_parameters())
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name in self.names:
            gradient = parameters[name].grad
            if gradient is not None:
                by_dtype.setdefault(gradient.dtype, []).append(local(gradient))
        for gradients in by_dtype.values():
            bucket = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(bucket, group=self._group)
            _copy_parts(bucket, gradients)


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group_name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group_name = group_name
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        bucket = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum", ctx.group_name)
        parts = bucket.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


def _copy_parts(bucket: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = bucket.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
