"""The product of tokens, sorted by expert, with each expert's own matrix: one kernel each."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import Tensor
from torch.nn import functional

_ALIGNMENT = 16
"""Bytes: torch's kernel takes matrices whose rows are multiples of it."""


class Kernel(Configurable, abc.ABC):
    """`y = x W_e^T` for the tokens of each expert `e`. N tokens, E experts, I features in, O features out."""

    def __init__(self, config: Configurable.Config) -> None:
        pass

    @abc.abstractmethod
    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        """`[N, O]`: the first `counts[0]` rows of `x` belong to expert 0, the next `counts[1]` to expert 1.

        Rows beyond all counts belong to nobody: what stands in them, and in their gradients, is undefined.
        """


class Loop(Kernel):
    """One product after the other: the reference. It waits for the counts on the CPU."""

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        *rows, beyond = x_NI.split([*counts, len(x_NI) - sum(counts)])
        products = [functional.linear(x, weight) for x, weight in zip(rows, weight_EOI, strict=True)]
        return torch.cat([*products, beyond.new_zeros(len(beyond), weight_EOI.shape[1])])


class GroupedMM(Kernel):
    """All products at once, by `torch.nn.functional.grouped_mm`.

    For operands that torch's kernel does not take (fp64; rows that are no multiple of 16 bytes) it is the loop.
    """

    def __init__(self, config: Configurable.Config) -> None:
        self._loop: Loop = Loop.Config().build()

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        _, out_features, in_features = weight_EOI.shape
        aligned = not any(size * x_NI.element_size() % _ALIGNMENT for size in (in_features, out_features))
        if x_NI.dtype is torch.float64 or not aligned:
            return self._loop(x_NI, weight_EOI, counts_E)
        ends = counts_E.cumsum(0, dtype=torch.int32)
        return functional.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends)
