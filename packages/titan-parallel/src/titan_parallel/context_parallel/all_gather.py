"""Context parallelism with all-gathered keys and values: the queries of a rank attend to all keys.

B batch, T tokens, t tokens of one rank, G key-value heads, K features of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from titan_parallel.context_parallel.attention_kernel import AttentionKernel, BuildMask, MaskDescription
from titan_parallel.context_parallel.sequence_sharding import ContextShards


class Gather:
    """The method `gather`: one collective per layer in the forward and one in the backward.

    It is exact for any attention core, and for any mask that depends on positions and documents.
    """

    def __init__(self, shards: ContextShards) -> None:
        self._shards = shards

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> Any:
        """Return the core's mask for this rank's queries and all keys."""
        return build_mask(gather_fields(mask, ("key_positions", "key_documents"), self._shards))

    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """Return the attention of this rank's queries to all keys, `[B, t, ..]`."""
        kv_BTGK = self._shards.whole(torch.cat([k, v], -1))
        k_BTGK, v_BTGK = kv_BTGK.split([k.size(-1), v.size(-1)], -1)
        return kernel(q, k_BTGK, v_BTGK, built_mask)


def gather_fields(mask: MaskDescription, names: tuple[str, ...], shards: ContextShards) -> Any:
    """Return the mask description with these fields gathered from all ranks, in the order of the sequence.

    Fields that are the same tensor object stay the same object.
    """
    own = {name: field for name in names if (field := getattr(mask, name)) is not None}
    distinct = list({id(field): field for field in own.values()}.values())
    wholes = shards.whole(torch.stack(distinct, -1)).unbind(-1)
    by_id = {id(field): whole for field, whole in zip(distinct, wholes, strict=True)}
    return dataclasses.replace(mask, **{name: by_id[id(field)] for name, field in own.items()})  # type: ignore[type-var]
