"""What an attention core is."""

from __future__ import annotations

import abc
from typing import Any

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.mask import Mask


class AttentionCore(Configurable, nn.Module, abc.ABC):
    """`softmax(scale q k^T, masked) v`, and nothing else: no weights, no positions, no knowledge of meshes.

    B batch, T queries, S keys, H query heads, G key-value heads (H a multiple of G), K and V features of a head.

    A query that sees no key gets zeros. A core for a ring of context ranks also has `with_lse(q, k, v, mask, scale)`,
    which returns the output and its log-sum-exp: `[B, T, H]`, fp32 or wider, -inf where a query sees nothing, and with
    a gradient of its own.
    """

    @abc.abstractmethod
    def realise(self, mask: Mask) -> Any:
        """What this core's kernel wants of `mask`, to be made once a forward and passed to every layer."""

    @abc.abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        """`q [B, T, H, K]`, `k [B, S, G, K]`, `v [B, S, G, V]` and what `realise` returned to `[B, T, H, V]`."""
