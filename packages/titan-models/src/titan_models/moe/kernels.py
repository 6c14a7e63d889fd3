"""Kernels of grouped matrix products: tokens sorted by expert, times the matrix of their expert."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from titan_models.moe.for_loop import expert_products

_ALIGNMENT = 16
"""Required alignment of matrix rows in `grouped_mm`, in bytes."""


class Kernel(Configurable, abc.ABC):
    """`y = x W_e^T` for the tokens of each expert `e`. N tokens, E experts, I features in, O features out."""

    def __init__(self, config: Configurable.Config) -> None:
        pass

    @abc.abstractmethod
    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        """Return `[N, O]`: the first `counts[0]` rows of `x` belong to expert 0, the next `counts[1]` to expert 1.

        Rows beyond the sum of the counts, and their gradients, are undefined.
        """


class ForLoop(Kernel):
    """The reference: one product per expert. It synchronizes with the GPU to read the counts.

    In compiled code the loop is one custom operator, since the compiler does not know the counts. In a dry run, where
    tensors have no data, the tokens are spread evenly over the experts; the total FLOPs and memory do not depend on it.
    """

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return expert_products(x_NI, weight_EOI, counts_E)
        counts = _even_counts(len(x_NI), len(counts_E)) if isinstance(x_NI, FakeTensor) else counts_E.tolist()
        *rows, padding = x_NI.split([*counts, len(x_NI) - sum(counts)])
        products = [functional.linear(x, weight) for x, weight in zip(rows, weight_EOI, strict=True)]
        return torch.cat([*products, padding.new_zeros(len(padding), weight_EOI.shape[1])])


class GroupedMM(Kernel):
    """All products in one kernel, `torch.nn.functional.grouped_mm`.

    Falls back to the loop for operands that the kernel does not support: fp64, rows whose size is no multiple of 16
    bytes, and while compiling every dtype but bf16.
    """

    def __init__(self, config: Configurable.Config) -> None:
        self._loop: ForLoop = ForLoop.Config().build()

    def __call__(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        if not _is_supported(x_NI, weight_EOI):
            return self._loop(x_NI, weight_EOI, counts_E)
        if isinstance(x_NI, FakeTensor) and x_NI.dtype is not torch.bfloat16:
            return expert_products(x_NI, weight_EOI, counts_E)  # dry run: one operator too, with the same sizes
        ends = counts_E.cumsum(0, dtype=torch.int32)
        return functional.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends)


def _is_supported(x_NI: Tensor, weight_EOI: Tensor) -> bool:
    """Return whether `grouped_mm` supports these operands."""
    if any(size * x_NI.element_size() % _ALIGNMENT for size in weight_EOI.shape[1:]):
        return False
    return x_NI.dtype is torch.bfloat16 or (x_NI.dtype is not torch.float64 and not torch.compiler.is_compiling())


def _even_counts(num_rows: int, num_experts: int) -> list[int]:
    """Return the number of rows of each expert, spread evenly."""
    return [(num_rows + expert) // num_experts for expert in range(num_experts)]
