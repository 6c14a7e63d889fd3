"""Assignment of the tokens of a sequence to context-parallel ranks, and the collectives that gather them again.

B batch, T tokens, t tokens of one rank, c context ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_parallel._torch.distributed import all_gather, all_to_all, reduce_scatter
from titan_parallel.mesh.collectives import Axis


@dataclass(frozen=True)
class ContextShards:
    """A sequence split over the context-parallel axis: in c equal parts, one per rank, or balanced in 2c parts.

    If balanced, rank r has the parts r and 2c - 1 - r. Under a causal mask late queries see more keys than early ones,
    so with an early and a late part all ranks have the same amount of work.
    """

    axis: Axis
    balanced: bool

    @property
    def num_parts(self) -> int:
        """The number of parts of one rank."""
        return 2 if self.balanced else 1

    @property
    def divisor(self) -> int:
        """The number of parts of a sequence; it must divide the sequence length."""
        return self.num_parts * self.axis.size

    def parts(self, rank: int) -> list[int]:
        """Return the indices of the parts of `rank` in the sequence."""
        return [rank, self.divisor - 1 - rank] if self.balanced else [rank]

    def local(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's tokens of a whole `x`, whose sequence dim is `dim`."""
        parts = x.chunk(self.divisor, dim)
        mine = [parts[part] for part in self.parts(self.axis.rank)]
        return torch.cat(mine, dim) if self.balanced else mine[0].contiguous()

    def local_tensors(self, tensors: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return this rank's tokens of the tensors that have a sequence dim, the others unchanged."""
        return {
            name: self.local(tensor, sequence_dims[name]) if name in sequence_dims else tensor
            for name, tensor in tensors.items()
        }

    def whole(self, x_Bt: Tensor) -> Tensor:
        """All-gather `[B, t, ..]` of each rank to `[B, T, ..]` in sequence order; gradients are reduce-scattered."""
        return _Whole.apply(x_Bt, self)

    def exchange(self, x_c: Tensor) -> Tensor:
        """Send slice r of `[c, ..]` to rank r, and return the slices `[c, ..]` from all ranks (all-to-all)."""
        return _Exchange.apply(x_c, self.axis)

    def in_order(self, x_cBt: Tensor) -> Tensor:
        """Return `[B, T, ..]` in sequence order, from the ranks' tokens `[c, B, t, ..]`."""
        if self.balanced:
            early, late = x_cBt.chunk(2, 2)
            x_cBt = torch.cat([early, late.flip(0)])
        return x_cBt.movedim(0, 1).flatten(1, 2)

    def by_rank(self, x_BT: Tensor) -> Tensor:
        """Return the tokens of each rank, `[c, B, t, ..]`, from `[B, T, ..]`: the inverse of `in_order`."""
        x_cBt = x_BT.unflatten(1, (self.divisor, -1)).movedim(1, 0)
        if self.balanced:
            early, late = x_cBt.chunk(2, 0)
            x_cBt = torch.cat([early, late.flip(0)], 2)
        return x_cBt


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Bt: Tensor, shards: ContextShards) -> Tensor:
        ctx.shards = shards
        axis = shards.axis
        stacked = all_gather(x_Bt, axis.size, axis.group_name)
        return shards.in_order(stacked.unflatten(0, (axis.size, -1)))

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        axis = ctx.shards.axis
        return reduce_scatter(ctx.shards.by_rank(grad_BT).flatten(0, 1), axis.size, axis.group_name), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_to_all(x, axis.group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.axis.group_name), None
