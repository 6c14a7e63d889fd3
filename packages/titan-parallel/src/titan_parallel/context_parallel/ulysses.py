"""Context parallel by exchanging tokens for heads (DeepSpeed Ulysses, Jacobs et al., 2023).

B batch, T tokens, t tokens of one rank, H query heads, h those of one rank, G key-value heads, K features, c ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor

from titan_parallel.context_parallel.all_gather import with_whole
from titan_parallel.context_parallel.attention_kernel import AttentionKernel, BuildMask, MaskDescription
from titan_parallel.context_parallel.sequence_sharding import ContextShards
from titan_parallel.mesh.parallel_dims import one_of

WHOLE = ("query_positions", "key_positions", "query_documents", "key_documents")


class Ulysses:
    """Each rank computes some heads of the whole sequence: the core sees the mask of one rank, fast paths and all.

    Two collectives a layer and direction. Key-value heads that are fewer than ranks are sent as often as needed.
    """

    def __init__(self, shards: ContextShards) -> None:
        self._shards = shards

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> Any:
        """What the core's own `build_mask` makes of the whole mask."""
        return build_mask(with_whole(mask, WHOLE, self._shards))

    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """`[B, t, ..]` to `[B, t, ..]`."""
        axis = self._shards.axis
        check_heads_divide(q.size(2), axis.size)
        repeats = math.lcm(k.size(2), axis.size) // k.size(2)
        k, v = (x.repeat_interleave(repeats, 2) if repeats > 1 else x for x in (k, v))
        q_BThK, k_BTgK, v_BTgK = self._tokens_to_heads([q, k, v])
        output_BThK = kernel.of_heads(axis.rank, axis.size)(q_BThK, k_BTgK, v_BTgK, built_mask)
        by_rank_cBthK = self._shards.exchange(self._shards.by_rank(output_BThK).contiguous())
        return by_rank_cBthK.movedim(0, 2).flatten(2, 3)

    def _tokens_to_heads(self, tensors: list[Tensor]) -> list[Tensor]:
        """`[B, t, H, K]` each to `[B, T, h, K]`, in one collective."""
        size = self._shards.axis.size
        by_heads = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in tensors]
        exchanged = self._shards.exchange(torch.cat([x.flatten(1) for x in by_heads], 1))
        parts = exchanged.split([x[0].numel() for x in by_heads], 1)
        return [self._shards.in_order(part.view(x.shape)) for part, x in zip(parts, by_heads, strict=True)]


def check_heads_divide(num_heads: int, degree: int) -> None:
    """Raise ConfigError naming the degrees that would do."""
    if num_heads % degree:
        possible = [str(divisor) for divisor in range(1, num_heads + 1) if num_heads % divisor == 0]
        raise ConfigError(
            f"Got {num_heads} heads (of one tensor rank) over context_parallel_degree {degree}. Ulysses gives each "
            f"rank as many heads as the others. Set context_parallel_degree to {one_of(possible)}, or "
            "context_parallel_method to gather or ring."
        )
