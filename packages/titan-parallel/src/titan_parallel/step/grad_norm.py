"""Gradient norm over all meshes, accumulated in fp64, and gradient clipping.

In fp32 the rounding error of the norm depends on how gradients are sharded over ranks. Through clipping, this error
makes the same run on two meshes diverge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel._torch.distributed import is_dtensor


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], num_ranks: int, device_type: str) -> Tensor:
    """Return the 2-norm of all gradients together, an fp64 scalar that is the same on every rank.

    Sums within a row run in fp32 (fp64 for fp64 gradients), sums over rows and ranks in fp64. This is as exact as fp64
    and as fast as fp32.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [_row_norms(local(gradient)) for gradient in gradients if _counts_here(gradient)]
    norm = torch.zeros((), dtype=torch.float64, device=device_type)
    if rows:
        norm = torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64)
    if num_ranks == 1:
        return norm
    squared = norm.square()
    dist.all_reduce(squared)
    return squared.sqrt()


@torch.no_grad()
def scale_gradients_(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their `norm` becomes at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    A non-finite norm leaves the gradients unscaled for inspection.
    """
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype[parameter.grad.dtype].append(local(parameter.grad))
    for dtype, gradients in by_dtype.items():
        torch._foreach_mul_(gradients, factor.to(dtype))


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or a plain tensor unchanged; the result shares memory with `tensor`.

    Call it under `torch.no_grad`.
    """
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _row_norms(gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dim=-1, dtype=wide).flatten()


def _counts_here(gradient: Tensor) -> bool:
    """Return whether this rank, of those that hold the same shard, is the one whose shard enters the norm."""
    if not is_dtensor(gradient):
        return True
    mesh, placements = gradient.device_mesh, gradient.placements  # type: ignore[attr-defined]
    return all(not p.is_replicate() or mesh.get_local_rank(axis) == 0 for axis, p in enumerate(placements))
