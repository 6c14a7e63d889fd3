"""What an attention core is."""

from __future__ import annotations

import abc
from typing import Any

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.attention.mask import Mask


class AttentionCore(Configurable, nn.Module, abc.ABC):
    """`softmax(scale q k^T, masked) v`, and nothing else: no positions, no knowledge of meshes.

    B batch, T queries, S keys, H query heads, G key-value heads (H a multiple of G), K and V features of a head.

    A query that sees no key gets zeros. A core for a ring of context ranks, or for context ranks and sinks, also has
    `with_lse(q, k, v, mask, scale)`, which returns the output and its log-sum-exp: `[B, T, H]`, fp32 or wider, -inf
    where a query sees nothing, and with a gradient of its own.
    """

    @abc.abstractmethod
    def build_mask(self, mask: Mask) -> Any:
        """What this core's kernel wants of `mask`, to be made once a forward and passed to every layer."""

    @abc.abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, sinks: Tensor | None = None) -> Tensor:
        """`q [B, T, H, K]`, `k [B, S, G, K]`, `v [B, S, G, V]` and what `build_mask` returned to `[B, T, H, V]`.

        `sinks [H]` are scores of one key more in each head, which every query sees and which has zeros as its value
        (Xiao et al., 2024). A core without the argument serves models without them.
        """


def sunk(output_BTHV: Tensor, lse_BTH: Tensor, sinks_H: Tensor) -> Tensor:
    """An attention's output whose softmax did not count the sinks, as if it had: all weights shrink alike."""
    kept_BTH = (lse_BTH - sinks_H.to(lse_BTH.dtype)).sigmoid()
    return output_BTHV * kept_BTH.unsqueeze(-1).to(output_BTHV.dtype)
