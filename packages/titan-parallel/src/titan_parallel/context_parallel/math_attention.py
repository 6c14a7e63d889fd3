"""Attention with a materialized score matrix, for features that fused kernels lack: log-sum-exp and soft-capping.

B batch, T queries, S keys, H query heads, G key-value heads, K features of a key, V of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the attention output `[B, T, H, V]` and the log-sum-exp `[B, T, H]`.

    `q [B, T, H, K]`, `k [B, S, G, K]`, `v [B, S, G, V]`; `mask` is bool, true where a query sees a key, and broadcasts
    to `[B, H, T, S]`; None is causal. Scores are computed in fp32 or wider. `softcap` caps them as
    `softcap * tanh(score / softcap)`. For a query that sees no key the output is 0 and the log-sum-exp is -inf.
    """
    groups = q.size(2) // k.size(2)
    wide = torch.promote_types(q.dtype, torch.float32)
    q_BHTK, k_BHSK, v_BHSV = (
        x.to(wide).transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    )
    if mask is None:
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril()
    scores_BHTS = q_BHTK * scale @ k_BHSK.transpose(-1, -2)
    if softcap is not None:
        scores_BHTS = softcap * (scores_BHTS / softcap).tanh()
    scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
    blind_BHT1 = ~mask.any(-1, keepdim=True).expand(*scores_BHTS.shape[:-1], 1)
    peak_BHT1 = scores_BHTS.detach().amax(-1, keepdim=True).masked_fill(blind_BHT1, 0)
    exp_BHTS = (scores_BHTS - peak_BHT1).exp()
    sum_BHT1 = exp_BHTS.sum(-1, keepdim=True).masked_fill(blind_BHT1, 1)
    output_BHTV = functional.dropout(exp_BHTS / sum_BHT1, dropout) @ v_BHSV
    lse_BHT1 = (sum_BHT1.log() + peak_BHT1).masked_fill(blind_BHT1, -torch.inf)
    return output_BHTV.transpose(1, 2).to(q.dtype), lse_BHT1.squeeze(-1).transpose(1, 2)
