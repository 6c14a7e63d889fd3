"""Attention by `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
from titan_config import Configurable
from torch import Tensor, nn
from torch.nn import functional

from titan_models.attention.kernels.kernel import AttentionCore, apply_sinks
from titan_models.attention.mask import Mask


class Sdpa(AttentionCore):
    """PyTorch's fused attention: flash attention for plain causal masks, a dense bool mask `[B, 1, T, S]` for others.

    On GPUs dense masks are slow and large for long sequences: use Flex there for packed documents. With sinks, all
    attention scores are materialized, as in `with_lse`.
    """

    def __init__(self, config: Configurable.Config) -> None:
        nn.Module.__init__(self)

    def build_mask(self, mask: Mask) -> Tensor | None:
        return None if mask.only_causal else mask.visible()[:, None]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        if sinks is not None:
            return apply_sinks(*self.with_lse(q, k, v, mask, scale), sinks)
        output = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return output.transpose(1, 2)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output and its log-sum-exp `[B, T, H]`, computed from all scores at once in fp32 or wider.

        The fused kernels do not return a log-sum-exp. Memory and time are those of `T x S` scores per head; Flex needs
        no such scores.
        """
        (_, num_queries, num_heads, _), num_keys = q.shape, k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        q_BHTK, k_BHSK, v_BHSV = (x.to(wide).transpose(1, 2) for x in (q, *_repeat_kv(k, v, num_heads)))
        if mask is None:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril()
        scores_BHTS = (q_BHTK * scale @ k_BHSK.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
        blind_BHT1 = ~mask.any(-1, keepdim=True).expand(*scores_BHTS.shape[:-1], 1)
        peak_BHT1 = scores_BHTS.detach().amax(-1, keepdim=True).masked_fill(blind_BHT1, 0)
        exp_BHTS = (scores_BHTS - peak_BHT1).exp()
        sum_BHT1 = exp_BHTS.sum(-1, keepdim=True).masked_fill(blind_BHT1, 1)
        output_BHTV = exp_BHTS @ v_BHSV / sum_BHT1
        lse_BHT1 = (sum_BHT1.log() + peak_BHT1).masked_fill(blind_BHT1, -torch.inf)
        return output_BHTV.transpose(1, 2).to(q.dtype), lse_BHT1.squeeze(-1).transpose(1, 2)


def _repeat_kv(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Repeat keys and values for each query head: `[B, S, G, K]` to `[B, S, H, K]`."""
    groups = num_heads // k.shape[2]
    return k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
