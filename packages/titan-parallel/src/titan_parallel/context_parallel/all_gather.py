"""Context parallel by gathering keys and values: a rank's own queries attend to all keys.

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
    """One collective a layer and direction, exact for any core, and any mask that positions and documents describe."""

    def __init__(self, shards: ContextShards) -> None:
        self._shards = shards

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> Any:
        """What the core's own `build_mask` makes of these queries and all keys."""
        return build_mask(with_whole(mask, ("key_positions", "key_documents"), self._shards))

    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """`[B, t, ..]` to `[B, t, ..]`."""
        kv_BTGK = self._shards.whole(torch.cat([k, v], -1))
        k_BTGK, v_BTGK = kv_BTGK.split([k.size(-1), v.size(-1)], -1)
        return kernel(q, k_BTGK, v_BTGK, built_mask)


def with_whole(mask: MaskDescription, names: tuple[str, ...], shards: ContextShards) -> Any:
    """The description with these fields of all ranks, in order; fields that were one tensor stay one."""
    own = {name: field for name in names if (field := getattr(mask, name)) is not None}
    distinct = list({id(field): field for field in own.values()}.values())
    wholes = shards.whole(torch.stack(distinct, -1)).unbind(-1)
    by_id = {id(field): whole for field, whole in zip(distinct, wholes, strict=True)}
    return dataclasses.replace(mask, **{name: by_id[id(field)] for name, field in own.items()})  # type: ignore[type-var]
