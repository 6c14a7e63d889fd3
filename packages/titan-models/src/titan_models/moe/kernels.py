"""The product of tokens, sorted by expert, with each expert's own matrix: one kernel each."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from titan_models.moe.loop import expert_products

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
    """One product after the other: the reference. It waits for the counts on the CPU.

    In compiled code, and where tensors have no memory, the loop is one operator: the counts are not known there.
    """

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if _only_shapes(x_NI):
            return expert_products(x_NI, weight_EOI, counts_E)
        counts = counts_E.tolist()
        *rows, beyond = x_NI.split([*counts, len(x_NI) - sum(counts)])
        products = [functional.linear(x, weight) for x, weight in zip(rows, weight_EOI, strict=True)]
        return torch.cat([*products, beyond.new_zeros(len(beyond), weight_EOI.shape[1])])


class GroupedMM(Kernel):
    """All products at once, by `torch.nn.functional.grouped_mm`.

    For operands that torch's kernel does not take (fp64; rows that are no multiple of 16 bytes; anything but bf16 while
    compiling or planning) it is the loop.
    """

    def __init__(self, config: Configurable.Config) -> None:
        self._loop: Loop = Loop.Config().build()

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if not _taken(x_NI, weight_EOI):
            return self._loop(x_NI, weight_EOI, counts_E)
        ends = counts_E.cumsum(0, dtype=torch.int32)
        return functional.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends)


def _taken(x_NI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch's kernel takes these operands."""
    if any(size * x_NI.element_size() % _ALIGNMENT for size in weight_EOI.shape[1:]):
        return False
    return x_NI.dtype is torch.bfloat16 or (x_NI.dtype is not torch.float64 and not _only_shapes(x_NI))


def _only_shapes(x: Tensor) -> bool:
    """Whether operators run on tensors without numbers: for a compiler, or a plan."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


@register_flop_formula([torch.ops.titan_models.expert_products, torch.ops.titan_models.expert_outer_products])
def _flops(one: torch.Size, other: torch.Size, *_sizes: torch.Size, **_more: object) -> int:
    """Of `[N, I]` and `[E, O, I]`, or of `[N, O]` and `[N, I]`."""
    return 2 * one[0] * one[1] * other[1]
