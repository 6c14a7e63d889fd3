"""Attention by `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from titan_config import Configurable
from torch import Tensor, nn
from torch.nn import functional

from titan_models.cores.core import AttentionCore
from titan_models.mask import Mask


class Sdpa(AttentionCore):
    """PyTorch's fused attention: flash for plain causal masks, a dense `[B, 1, T, S]` bool mask for all others.

    On GPUs dense masks are slow and large at long sequences: use Flex there for packed documents.
    """

    def __init__(self, config: Configurable.Config) -> None:
        nn.Module.__init__(self)

    def realise(self, mask: Mask) -> Tensor | None:
        return None if mask.only_causal else mask.visible()[:, None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
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
