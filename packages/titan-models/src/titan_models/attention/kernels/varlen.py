"""Attention by `torch.nn.attention.varlen`: each document is a sequence of its own length."""

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
    """The sequences that all rows consist of, one after the other."""

    borders: Tensor
    """[N + 1] int32: sequence i is the tokens from borders[i] to borders[i + 1]."""

    longest: int
    """Tokens that none has more of."""

    window: int | None
    """Keys that a query sees; None: all before it."""


class Varlen(AttentionCore):
    """Flash attention over sequences of any length: nothing is computed between documents, and no mask is made.

    For queries that are the keys, whose documents are in one mapping each, with `SlidingWindow` and `Chunks` and no other
    mask_modifiers. Rows of documents are read once a forward, so a GPU waits once. On CPUs it is a loop over sequences.
    """

    def __init__(self, config: Configurable.Config) -> None:
        nn.Module.__init__(self)

    def build_mask(self, mask: Mask) -> Sequences:
        """Raises ValueError for a mask that is no row of sequences."""
        if mask.query_positions is not mask.key_positions:
            raise ValueError(
                "Got queries that are not the keys. Varlen attends within sequences. Take Sdpa or Flex, or "
                "context_parallel_method ulysses."
            )
        windows = [limit.size for limit in mask.mask_modifiers if isinstance(limit, SlidingWindow)]
        chunks = [limit.size for limit in mask.mask_modifiers if isinstance(limit, Chunks)]
        if len(windows) + len(chunks) < len(mask.mask_modifiers):
            others = [
                type(limit).__name__ for limit in mask.mask_modifiers if not isinstance(limit, SlidingWindow | Chunks)
            ]
            raise ValueError(f"Got the limit {others[0]}. Varlen knows SlidingWindow and Chunks. Take Sdpa or Flex.")
        positions = mask.query_positions
        marks = [positions // size for size in chunks]
        if mask.query_documents is not None:
            marks.append(mask.query_documents)
        begins_BT = torch.zeros_like(positions, dtype=torch.bool)
        begins_BT[:, 0] = True
        for mark in marks:
            begins_BT[:, 1:] |= mark[:, 1:] != mark[:, :-1]
        (begins_N,) = begins_BT.flatten().nonzero(as_tuple=True)
        borders = functional.pad(begins_N, (0, 1), value=positions.numel()).to(torch.int32)
        return Sequences(borders, positions.shape[1], min(windows, default=None))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Sequences, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        if sinks is not None:
            raise ValueError("Got sinks. Varlen's kernel has none. Take Flex, or Sdpa on a CPU.")
        attend = _attend_on_gpu if q.device.type == "cuda" else _attend_one_by_one
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, scale).unflatten(0, q.shape[:2])


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """All of `[tokens, heads, features]` by PyTorch's kernel."""
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


def _attend_one_by_one(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
    lengths = sequences.borders.diff().tolist()
    outputs = [
        _attend_within(*parts, sequences.window, scale)
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


def _attend_within(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    seen = None
    if window is not None:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
    output = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output[0].transpose(0, 1)
