"""The product of tokens, sorted by expert, with each expert's own matrix: one kernel each."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from titan_models.moe.for_loop import expert_products

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


class ForLoop(Kernel):
    """One product after the other: the reference. It waits for the counts on the CPU.

    In compiled code the loop is one operator, since a compiler cannot know the counts. In a plan, where tensors have no
    memory, experts have as many tokens each: whatever the counts, all sizes together are the same.
    """

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return expert_products(x_NI, weight_EOI, counts_E)
        counts = _even(len(x_NI), len(counts_E)) if isinstance(x_NI, FakeTensor) else counts_E.tolist()
        *rows, beyond = x_NI.split([*counts, len(x_NI) - sum(counts)])
        products = [functional.linear(x, weight) for x, weight in zip(rows, weight_EOI, strict=True)]
        return torch.cat([*products, beyond.new_zeros(len(beyond), weight_EOI.shape[1])])


class GroupedMM(Kernel):
    """All products at once, by `torch.nn.functional.grouped_mm`.

    For operands that torch's kernel does not take (fp64; rows that are no multiple of 16 bytes; anything but bf16 while
    compiling) it is the loop.
    """

    def __init__(self, config: Configurable.Config) -> None:
        self._loop: ForLoop = ForLoop.Config().build()

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if not _taken(x_NI, weight_EOI):
            return self._loop(x_NI, weight_EOI, counts_E)
        if isinstance(x_NI, FakeTensor) and x_NI.dtype is not torch.bfloat16:
            return expert_products(x_NI, weight_EOI, counts_E)  # in a plan: one operator too, of the same sizes
        ends = counts_E.cumsum(0, dtype=torch.int32)
        return functional.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends)


def _taken(x_NI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch's kernel takes these operands."""
    if any(size * x_NI.element_size() % _ALIGNMENT for size in weight_EOI.shape[1:]):
        return False
    return x_NI.dtype is torch.bfloat16 or (x_NI.dtype is not torch.float64 and not torch.compiler.is_compiling())


def _even(num_rows: int, num_experts: int) -> list[int]:
    """Rows of each expert, as even as can be."""
    return [(num_rows + expert) // num_experts for expert in range(num_experts)]
