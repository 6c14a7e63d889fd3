"""Cross-entropy summed over labels, for whole logits or logits sharded over the vocabulary.

N tokens, V vocabulary, v vocabulary of one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from titan_parallel._torch.distributed import all_reduce, is_dtensor
from titan_parallel.mesh.collectives import Axis


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0) -> Tensor:
    """Return the sum of -log softmax(logits)[label] over the labels that are not `ignore_index`.

    `logits [..., V]` is a plain tensor, or a DTensor sharded along its last dim; `labels [...]` is int64. For each of
    these labels, `z_loss` times the squared log-sum-exp of the logits is added (Chowdhery et al., "PaLM", 2022, section
    5). Computed in fp32, or in fp64 for fp64 logits. Sharded logits are never gathered, and for the backward a rank
    saves only its own shard of them.
    """
    labels_N = labels.flatten()
    if is_dtensor(logits):
        axis = Axis.of(logits.device_mesh)  # type: ignore[attr-defined]
        local_Nv = logits.to_local().flatten(0, -2)  # type: ignore[attr-defined]
        start, _ = axis.chunk(logits.size(-1))
        return _SplitCrossEntropy.apply(
            local_Nv, labels_N, ignore_index, z_loss, start, logits.size(-1), axis.group_name
        )
    wide_NV = _upcast(logits.flatten(0, -2))
    loss = functional.cross_entropy(wide_NV, labels_N, reduction="sum", ignore_index=ignore_index)
    if z_loss:
        squares_N = wide_NV.logsumexp(-1).square()
        loss = loss + z_loss * squares_N.masked_fill(labels_N == ignore_index, 0).sum()
    return loss


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_Nv: Tensor,
        labels_N: Tensor,
        ignore_index: int,
        z_loss: float,
        start: int,
        vocab_size: int,
        group_name: str,
    ) -> Tensor:
        wide_Nv = _upcast(logits_Nv)
        max_N = all_reduce(wide_Nv.amax(-1), "max", group_name)
        valid_N = labels_N != ignore_index
        mine_N = valid_N & (labels_N >= start) & (labels_N < start + logits_Nv.size(-1))
        beyond_N = valid_N & ((labels_N < 0) | (labels_N >= vocab_size))
        index_N1 = torch.where(mine_N, labels_N - start, torch.where(beyond_N, vocab_size, 0)).unsqueeze(-1)
        target_N = wide_Nv.gather(-1, index_N1).squeeze(-1).masked_fill(~mine_N, 0)
        sum_exp_N = (wide_Nv - max_N.unsqueeze(-1)).exp().sum(-1)
        sum_exp_N, target_N = all_reduce(torch.stack([sum_exp_N, target_N]), "sum", group_name)
        log_sum_exp_N = sum_exp_N.log() + max_N
        ctx.save_for_backward(logits_Nv, log_sum_exp_N, index_N1, mine_N, valid_N)
        ctx.z_loss = z_loss
        loss_N = log_sum_exp_N - target_N + z_loss * log_sum_exp_N.square()
        return loss_N.masked_fill(~valid_N, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        logits_Nv, log_sum_exp_N, index_N1, mine_N, valid_N = ctx.saved_tensors
        grad_Nv = (_upcast(logits_Nv) - log_sum_exp_N.unsqueeze(-1)).exp()
        if ctx.z_loss:
            grad_Nv *= (1 + 2 * ctx.z_loss * log_sum_exp_N).unsqueeze(-1)
        grad_Nv.scatter_add_(-1, index_N1, -mine_N.unsqueeze(-1).to(grad_Nv.dtype))
        grad_Nv *= (valid_N * grad).unsqueeze(-1)
        return grad_Nv.to(logits_Nv.dtype), None, None, None, None, None, None
