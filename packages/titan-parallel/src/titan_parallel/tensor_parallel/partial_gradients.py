"""Gradients of which each tensor-parallel rank has a share: when they are summed over the tensor axis."""

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
    """Makes whole the gradients of parameters of which each rank computes with its own features, or its own tokens.

    Any backward sums them as it goes, those of a unit in one go, so that a loop of somebody's own finds them whole.
    Within `summed_at_the_end` they are summed once, for all units and micro-batches of a step.
    """

    def __init__(self, names: Sequence[str], group: dist.ProcessGroup) -> None:
        self.names = names
        self._group = group
        self._waits = False

    def summed_in_backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """These tensors as they are; what flows back through them is summed over ranks, unless the end does it."""
        if self._waits or not torch.is_grad_enabled() or not tensors:
            return tensors
        return _SumGradients.apply(self._group.group_name, *tensors)

    @contextmanager
    def summed_at_the_end(self, model: nn.Module) -> Iterator[None]:
        """Leave the shares in `.grad` of the model's parameters, and sum them all at the end."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self._sum(model)

    @torch.no_grad()
    def _sum(self, model: nn.Module) -> None:
        """One sum for each dtype. (Sums over axes commute: these gradients are summed over data ranks already.)"""
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
