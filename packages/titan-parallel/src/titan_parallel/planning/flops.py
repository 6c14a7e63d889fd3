"""Count the FLOPs of a forward in both common conventions: full and causal attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


class ForwardFlops:
    """The FLOPs of matrix products and attention in forwards, summed.

    `full` counts every pair of query and key, `causal` half of them.
    """

    def __init__(self) -> None:
        self.full = 0
        self.causal = 0

    def operator_ran(self, operator: Any, arguments: Any, keywords: Any, output: Any) -> None:
        """Add the FLOPs of the operator, if it has a formula."""
        packet = operator._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self._add_attention(*arguments, **keywords)
        elif packet is torch.ops.aten._grouped_mm:
            self._add_products(2 * output.numel() * arguments[0].size(-1))
        elif packet in flop_registry:
            self._add_products(flop_registry[packet](*arguments, **keywords, out_val=output))

    def _add_products(self, flops: int) -> None:
        self.full += flops
        self.causal += flops

    def _add_attention(
        self, query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **options: Any
    ) -> None:
        batch, heads, queries, features = query.shape
        flops = 2 * batch * heads * queries * key.shape[-2] * (features + value.shape[-1])
        self.full += flops
        self.causal += flops // 2 if is_causal or options.get("attn_mask") is not None else flops
