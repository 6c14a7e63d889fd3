"""The interface of attention cores."""

from __future__ import annotations

import abc
from typing import Any

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.attention.mask import Mask


class AttentionCore(Configurable, nn.Module, abc.ABC):
    """`softmax(scale q k^T, masked) v`, independent of positions and meshes.

    B batch, T queries, S keys, H query heads, G key-value heads (H a multiple of G), K and V features of a head.

    The output of a query that sees no key is zero. A core that supports ring attention, or sinks under context
    parallelism, also has `with_lse(q, k, v, mask, scale)`, which returns the output and its log-sum-exp `[B, T, H]`:
    fp32 or wider, differentiable, and -inf where a query sees no key.
    """

    @abc.abstractmethod
    def build_mask(self, mask: Mask) -> Any:
        """Return the mask in the form of the kernel. It is built once per forward and passed to each layer."""

    @abc.abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, sinks: Tensor | None = None) -> Tensor:
        """Return `[B, T, H, V]` for `q [B, T, H, K]`, `k [B, S, G, K]`, `v [B, S, G, V]` and a mask of `build_mask`.

        `sinks [H]` are the logits of one additional key in each head, visible to every query and with value 0 (Xiao et
        al., 2024). A core without this argument supports only models without sinks.
        """


def apply_sinks(output_BTHV: Tensor, lse_BTH: Tensor, sinks_H: Tensor) -> Tensor:
    """Rescale the output of attention computed without sinks to that with sinks: all weights shrink by one factor."""
    kept_BTH = (lse_BTH - sinks_H.to(lse_BTH.dtype)).sigmoid()
    return output_BTHV * kept_BTH.unsqueeze(-1).to(output_BTHV.dtype)
