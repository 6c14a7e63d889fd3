"""Context parallelism with all-to-all from tokens to heads (DeepSpeed Ulysses, Jacobs et al., 2023).

B batch, T tokens, t tokens of one rank, H query heads, h those of one rank, G key-value heads, K features, c ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor

from titan_parallel.context_parallel.all_gather import gather_fields
from titan_parallel.context_parallel.attention_kernel import AttentionKernel, BuildMask, MaskDescription
from titan_parallel.context_parallel.sequence_sharding import ContextShards
from titan_parallel.mesh.parallel_dims import one_of

WHOLE = ("query_positions", "key_positions", "query_documents", "key_documents")


class Ulysses:
    """The method `ulysses`: each rank computes some of the heads on the whole sequence.

    The core receives the same mask as on a single rank, and so keeps its fast paths. Two collectives per layer in the
    forward, and two in the backward. If there are fewer key-value heads than ranks, they are sent repeatedly.
    """

    def __init__(self, shards: ContextShards) -> None:
        self._shards = shards

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> Any:
        """Return the core's mask for the whole sequence."""
        return build_mask(gather_fields(mask, WHOLE, self._shards))

    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """Return the attention of this rank's queries to all keys, `[B, t, ..]`."""
        axis = self._shards.axis
        check_heads_divide(q.size(2), axis.size)
        repeats = math.lcm(k.size(2), axis.size) // k.size(2)
        k, v = (x.repeat_interleave(repeats, 2) if repeats > 1 else x for x in (k, v))
        q_BThK, k_BTgK, v_BTgK = self._tokens_to_heads([q, k, v])
        output_BThK = kernel.of_heads(axis.rank, axis.size)(q_BThK, k_BTgK, v_BTgK, built_mask)
        by_rank_cBthK = self._shards.exchange(self._shards.by_rank(output_BThK).contiguous())
        return by_rank_cBthK.movedim(0, 2).flatten(2, 3)

    def _tokens_to_heads(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return `[B, T, h, K]` of each tensor `[B, t, H, K]`, with one all-to-all for all."""
        size = self._shards.axis.size
        by_heads = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in tensors]
        exchanged = self._shards.exchange(torch.cat([x.flatten(1) for x in by_heads], 1))
        parts = exchanged.split([x[0].numel() for x in by_heads], 1)
        return [self._shards.in_order(part.view(x.shape)) for part, x in zip(parts, by_heads, strict=True)]


def check_heads_divide(num_heads: int, degree: int) -> None:
    """Raise ConfigError with the valid degrees if `degree` does not divide `num_heads`."""
    if num_heads % degree:
        possible = [str(divisor) for divisor in range(1, num_heads + 1) if num_heads % divisor == 0]
        raise ConfigError(
            f"context_parallel_degree must divide the number of heads of a tensor-parallel rank ({num_heads}) with "
            f"context_parallel_method ulysses, got {degree}. Use {one_of(possible)}, or the method gather or ring."
        )
