"""Matrix products in a loop over experts, as custom operators that hide the token counts from the compiler."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("titan_models::expert_products", mutates_args=())
def expert_products(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Return `x W_e^T` for the tokens of each expert, `[N, O]`; zeros for rows beyond the sum of the counts."""
    products_NO = x_NI.new_zeros(len(x_NI), weight_EOI.shape[1])
    for rows, weight in zip(_row_slices(counts_E), weight_EOI, strict=True):
        products_NO[rows] = functional.linear(x_NI[rows], weight)
    return products_NO


@torch.library.custom_op("titan_models::expert_outer_products", mutates_args=())
def expert_outer_products(y_NO: Tensor, x_NI: Tensor, counts_E: Tensor) -> Tensor:
    """Return `y^T x` over the tokens of each expert, `[E, O, I]`."""
    products_EOI = y_NO.new_zeros(len(counts_E), y_NO.shape[1], x_NI.shape[1])
    for expert, rows in enumerate(_row_slices(counts_E)):
        products_EOI[expert] = y_NO[rows].T @ x_NI[rows]
    return products_EOI


def _row_slices(counts_E: Tensor) -> list[slice]:
    ends = counts_E.cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


@expert_products.register_fake
def _(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return x_NI.new_empty(len(x_NI), weight_EOI.shape[1])


@expert_outer_products.register_fake
def _(y_NO: Tensor, x_NI: Tensor, counts_E: Tensor) -> Tensor:
    return y_NO.new_empty(len(counts_E), y_NO.shape[1], x_NI.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_NI, weight_EOI, counts_E = ctx.saved_tensors
    grad_x_NI = expert_products(grad_NO, weight_EOI.transpose(1, 2), counts_E)
    return grad_x_NI, expert_outer_products(grad_NO, x_NI, counts_E), None


expert_products.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.titan_models.expert_products, torch.ops.titan_models.expert_outer_products])
def _flops(left: torch.Size, right: torch.Size, *_sizes: torch.Size, **_options: object) -> int:
    """Return the FLOPs of a product of `[N, I]` and `[E, O, I]`, or of `[N, O]` and `[N, I]`."""
    return 2 * left[0] * left[1] * right[1]
