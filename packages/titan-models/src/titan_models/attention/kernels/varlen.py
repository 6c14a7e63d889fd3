"""Attention by `torch.nn.attention.varlen`: each document is a sequence with its own length."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from titan_config import Configurable
from torch import Tensor, nn
from torch.nn import functional

from titan_models.attention.kernels.kernel import AttentionCore
from titan_models.attention.mask import Chunks, Mask, SlidingWindow


class Sequences(NamedTuple):
    """The variable-length sequences of a flattened batch."""

    borders: Tensor
    """[N + 1] int32: sequence i has the tokens from borders[i] up to borders[i + 1] (cu_seqlens)."""

    longest: int
    """Upper bound of the sequence lengths in tokens (max_seqlen)."""

    window: int | None
    """Number of keys that a query sees, its own included. None: all up to its own."""


class Varlen(AttentionCore):
    """Flash attention over variable-length sequences: no computation across documents, and no mask in memory.

    For self-attention whose documents are contiguous, with no mask modifiers besides `SlidingWindow` and `Chunks`. The
    borders are computed once per forward, which synchronizes with the GPU once. On CPUs it is a loop over sequences.
    """

    def __init__(self, config: Configurable.Config) -> None:
        nn.Module.__init__(self)

    def build_mask(self, mask: Mask) -> Sequences:
        """Return the sequences of a mask. Raises ValueError for a mask that is none of contiguous sequences."""
        if mask.query_positions is not mask.key_positions:
            raise ValueError(
                "Varlen supports only self-attention, got different positions of queries and keys. Use Sdpa or Flex, "
                "or context_parallel_method ulysses."
            )
        windows = [modifier.size for modifier in mask.mask_modifiers if isinstance(modifier, SlidingWindow)]
        chunks = [modifier.size for modifier in mask.mask_modifiers if isinstance(modifier, Chunks)]
        if len(windows) + len(chunks) < len(mask.mask_modifiers):
            others = [
                type(modifier).__name__
                for modifier in mask.mask_modifiers
                if not isinstance(modifier, SlidingWindow | Chunks)
            ]
            raise ValueError(
                f"Varlen supports the mask modifiers SlidingWindow and Chunks, got {others[0]}. Use Sdpa or Flex."
            )
        positions = mask.query_positions
        ids = [positions // size for size in chunks]
        if mask.query_documents is not None:
            ids.append(mask.query_documents)
        begins_BT = torch.zeros_like(positions, dtype=torch.bool)
        begins_BT[:, 0] = True
        for id_BT in ids:
            begins_BT[:, 1:] |= id_BT[:, 1:] != id_BT[:, :-1]
        (begins_N,) = begins_BT.flatten().nonzero(as_tuple=True)
        borders = functional.pad(begins_N, (0, 1), value=positions.numel()).to(torch.int32)
        return Sequences(borders, positions.shape[1], min(windows, default=None))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Sequences, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        if sinks is not None:
            raise ValueError("Varlen does not support attention sinks. Use Flex, or Sdpa on a CPU.")
        attend = _attend_on_gpu if q.device.type == "cuda" else _attend_on_cpu
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, scale).unflatten(0, q.shape[:2])


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """Return the attention output of inputs `[tokens, heads, features]` by PyTorch's kernel."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options = {"enable_gqa": True}
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    borders, longest = sequences.borders, sequences.longest
    window = (-1 if sequences.window is None else sequences.window - 1, 0)
    output: Any = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=window, **options)
    return output


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
    lengths = sequences.borders.diff().tolist()
    outputs = [
        _attend_within(*qkv, sequences.window, scale)
        for qkv in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


def _attend_within(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None
    if window is not None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
    output = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output[0].transpose(0, 1)
