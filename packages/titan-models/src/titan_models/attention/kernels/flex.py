"""Attention by `torch.nn.attention.flex_attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from titan_models.attention.kernels.kernel import AttentionCore, apply_sinks
from titan_models.attention.mask import Mask


class Flex(AttentionCore):
    """FlexAttention, the block-sparse attention of PyTorch: blocks that a mask hides entirely are not computed.

    Compiled on GPUs. On CPUs it runs eagerly and forward only, since PyTorch has no backward for it there.
    """

    class Config(AttentionCore.Config):
        block_size: int = 128
        """Number of queries, and of keys, in a block of the mask."""

        def validate(self) -> None:
            if self.block_size < 16 or self.block_size % 16:
                raise ValueError(f"Flex block_size must be a multiple of 16 above 0, got {self.block_size}.")

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        self.block_size = config.block_size

    def build_mask(self, mask: Mask) -> BlockMask:
        (batch, num_queries), num_keys = mask.query_positions.shape, mask.key_positions.shape[1]
        device = mask.query_positions.device
        shape = (None if mask.only_causal else batch, None, num_queries, num_keys)
        create = _compiled_on_gpu(device, create_block_mask)
        return create(_mask_mod(mask), *shape, device=device, BLOCK_SIZE=self.block_size)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        if sinks is not None:
            return apply_sinks(*self.with_lse(q, k, v, mask, scale), sinks)
        output: Tensor = self._attention(q, k, v, mask, scale)
        return output.transpose(1, 2)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output and its log-sum-exp `[B, T, H]`, which the kernel computes anyway."""
        output, auxiliary = self._attention(q, k, v, mask, scale, return_aux=AuxRequest(lse=True))
        return output.transpose(1, 2), auxiliary.lse.transpose(1, 2)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, **options: Any) -> Any:
        return _compiled_on_gpu(q.device, flex_attention)(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
            **options,
        )


def _mask_mod(mask: Mask) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the `mask_mod` of FlexAttention: (batch, head, query index, key index) to bool."""
    if mask.only_causal:
        return lambda batch, head, query, key: query >= key
    query_positions, key_positions = mask.query_positions, mask.key_positions
    query_documents, key_documents = mask.query_documents, mask.key_documents

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if query_documents is None or key_documents is None:
            return mask.rule(query_positions[batch, query], key_positions[batch, key], None, None)
        documents = query_documents[batch, query], key_documents[batch, key]
        return mask.rule(query_positions[batch, query], key_positions[batch, key], *documents)

    return visible


def _compiled_on_gpu(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compile(function) if device.type == "cuda" else function


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
