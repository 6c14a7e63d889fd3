"""The rule by which two tensors of two runs are the same, and what can be said of those that are not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCES = {torch.float64: (1e-10, 1e-13), torch.float32: (1e-6, 1e-8)}
"""dtype -> (share of a tensor's own norm, share of the norm of all of its kind) by which it may differ."""


@dataclass(frozen=True)
class Comparison:
    """How far a tensor is from the expected one: `|g - g0| <= a |g0| + b |all g0|`, 2-norms, is the same."""

    ratio: float
    """The error over what the rule allows: at most 1 is the same; infinite where the tensor is not finite."""
    error: float
    """The error over the expected norm."""
    share: float
    """The expected norm over that of all."""
    factor: float
    """The multiple of the expected tensor that is nearest: <g, g0> / <g0, g0>."""
    rest: float
    """What is left beside that multiple, over the expected norm."""

    @property
    def same(self) -> bool:
        """Whether the rule holds."""
        return self.ratio <= 1


def compare(
    got: Tensor, expected: Tensor, norm_of_all: Tensor, tolerances: tuple[float, float] | None = None
) -> Comparison:
    """Judge `got` by the rule for the dtype of `expected`, or by other tolerances. Shapes are equal."""
    own, of_all = tolerances or TOLERANCES[expected.dtype]
    got, expected = got.double(), expected.double()
    error, size = norm(got - expected), norm(expected)
    factor = (got * expected).sum() / size.square()
    rest = norm(got - factor * expected)
    return Comparison(
        ratio=_quotient(error, own * size + of_all * norm_of_all),
        error=_quotient(error, size),
        share=_quotient(size, norm_of_all),
        factor=float(factor),
        rest=_quotient(rest, size),
    )


def norm(tensor: Tensor) -> Tensor:
    """The 2-norm, accumulated in fp64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of several tensors together."""
    return torch.stack([norm(tensor) for tensor in tensors]).norm()


def _quotient(numerator: Tensor, denominator: Tensor) -> float:
    """Nothing over nothing is 0; what is not finite is infinitely wrong."""
    if numerator == 0:
        return 0.0
    quotient = float(numerator / denominator)
    return math.inf if math.isnan(quotient) else quotient
