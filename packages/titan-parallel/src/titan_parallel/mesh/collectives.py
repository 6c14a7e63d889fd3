"""Differentiable collectives of tensor parallelism, used at the borders of regions.

B batch, T tokens, t tokens of one rank, D width, F features, f features of one rank, V vocabulary, v vocabulary of one
rank. The sequence is dim -2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel._torch.distributed import all_gather, all_reduce, reduce_scatter


@dataclass(frozen=True)
class Axis:
    """This rank's place in the process group of one mesh axis."""

    group_name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Axis:
        """Return the axis of a mesh with a single axis."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    def chunk(self, length: int) -> tuple[int, int]:
        """Return where this rank's chunk of `length` rows starts and stops: equal chunks, the last ones smaller."""
        step = -(-length // self.size)
        return min(self.rank * step, length), min((self.rank + 1) * step, length)

    def copy(self, x: Tensor) -> Tensor:
        """Return `x`, which is the same on every rank; its gradients are summed over ranks."""
        return _Copy.apply(x, self.group_name)

    def sum(self, x: Tensor, of_gradients: bool = False) -> Tensor:
        """Return the sum over ranks.

        The gradient of the result is the same on every rank, or, with `of_gradients`, partial: then it is summed too.
        """
        return _Sum.apply(x, self.group_name, of_gradients)

    def gather_sequence(self, x_BtD: Tensor) -> Tensor:
        """All-gather `[.., t, D]` of each rank to `[.., T, D]`; gradients are reduce-scattered."""
        return _GatherSequence.apply(x_BtD, self.group_name, self.size)

    def sum_scatter_sequence(self, x_BTD: Tensor) -> Tensor:
        """Reduce-scatter `[.., T, D]` of each rank to `[.., t, D]`; gradients are all-gathered.

        Raises ValueError if the number of ranks does not divide T.
        """
        if x_BTD.size(-2) % self.size:
            raise ValueError(sequence_error(x_BTD.size(-2), self.size))
        return _SumScatterSequence.apply(x_BTD, self.group_name, self.size)

    def own_tokens(self, x_BTD: Tensor) -> Tensor:
        """Return this rank's tokens `[.., t, D]` of a sequence that every rank has.

        The gradient of `x_BTD` is zero outside these tokens: the sum over ranks is the whole gradient. Raises
        ValueError if the number of ranks does not divide T.
        """
        if x_BTD.size(-2) % self.size:
            raise ValueError(sequence_error(x_BTD.size(-2), self.size))
        return x_BTD.unflatten(-2, (self.size, -1)).select(-3, self.rank).contiguous()

    def gather_features(self, x_BTf: Tensor) -> Tensor:
        """All-gather `[.., f]` of each rank to `[.., F]`; gradients are partial sums, and are reduce-scattered."""
        return _GatherFeatures.apply(x_BTf, self.group_name, self.size)

    def gather_vocabulary(self, x_BTv: Tensor, vocab_size: int) -> Tensor:
        """All-gather `[.., v]` of each rank to `[.., V]`; each rank takes its slice of the gradient, without a sum.

        All ranks must compute the same loss from the result.
        """
        return _GatherVocabulary.apply(x_BTv, self, vocab_size)


def sequence_error(length: int, size: int) -> str:
    """Return the error message for a sequence that sequence parallelism cannot split."""
    return (
        f"The sequence length must be a multiple of tensor_parallel_degree ({size}) with sequence parallelism, got "
        f"{length}. Change the length, or set sequence_parallel to false."
    )


def _gather(x: Tensor, group_name: str, size: int) -> Tensor:
    stacked = all_gather(x, size, group_name).unflatten(0, (size, -1))
    return stacked.movedim(0, -3).flatten(-3, -2)


def _sum_scatter(x: Tensor, group_name: str, size: int) -> Tensor:
    stacked = x.unflatten(-2, (size, -1)).movedim(-3, 0)
    return reduce_scatter(stacked.contiguous().flatten(0, 1), size, group_name)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, "sum", ctx.group_name), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, of_gradients: bool) -> Tensor:
        ctx.group_name, ctx.of_gradients = group_name, of_gradients
        return all_reduce(x, "sum", group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad, "sum", ctx.group_name) if ctx.of_gradients else grad, None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group_name, ctx.size = group_name, size
        return _gather(x, group_name, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_scatter(grad, ctx.group_name, ctx.size), None, None


class _SumScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group_name, ctx.size = group_name, size
        return _sum_scatter(x, group_name, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.group_name, ctx.size), None, None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group_name, ctx.size = group_name, size
        return all_gather(x.movedim(-1, 0), size, group_name).movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad.movedim(-1, 0), ctx.size, ctx.group_name).movedim(0, -1).contiguous(), None, None


class _GatherVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, vocab_size: int) -> Tensor:
        ctx.start, ctx.stop = axis.chunk(vocab_size)
        widest = -(-vocab_size // axis.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.size(-1)))
        whole = all_gather(padded.movedim(-1, 0), axis.size, axis.group_name)
        return whole[:vocab_size].movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[..., ctx.start : ctx.stop].contiguous(), None, None
