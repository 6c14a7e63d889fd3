"""The rule by which two tensors of two runs are the same, and what can be said of those that are not.

In fp64: `|g - g0| <= 1e-10 |g0| + 1e-13 |all|`, 2-norms of a tensor and of all of its kind. The second term is for
gradients that are zero but for rounding.

In fp32 and bf16 no fixed numbers hold for every model and every CPU. There `g0` is of fp64, and the rounding of the
plain process is measured: `|g - g0| <= 10 (|p - g0| + u |g0|)`, where `p` is what the plain process finds in the dtype
of `g`, and u is the unit roundoff of that dtype. A gradient that is zero but for rounding may be ten times the zero of
the plain process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OF_ITSELF, OF_ALL = 1e-10, 1e-13
"""In fp64, the shares of a tensor's own norm and of the norm of all of its kind by which it may differ."""
MULTIPLE = 10
"""In fp32 and bf16, by how many times the rounding of the plain process a tensor may differ."""


@dataclass(frozen=True)
class Comparison:
    """How far a tensor is from the expected one."""

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


def compare(got: Tensor, expected: Tensor, norm_of_all: Tensor, rounding: float | None = None) -> Comparison:
    """Judge `got` by the expected tensor, which is fp64; shapes are equal.

    `rounding` is that of the plain process (`roundings`), where `got` was computed in fp32 or bf16. `norm_of_all` is
    the norm of the expected tensors of this kind.
    """
    unit = torch.finfo(got.dtype).eps / 2
    got, expected = got.double(), expected.double()
    error, size = norm(got - expected), norm(expected)
    factor = (got * expected).sum() / size.square()
    rest = norm(got - factor * expected)
    exact = OF_ITSELF * size + OF_ALL * norm_of_all
    allowed = exact if rounding is None else MULTIPLE * (rounding + unit * size)
    return Comparison(
        ratio=_quotient(error, allowed),
        error=_quotient(error, size),
        share=_quotient(size, norm_of_all),
        factor=float(factor),
        rest=_quotient(rest, size),
    )


def roundings(plain: Sequence[Mapping[str, Tensor]], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The rounding of each tensor of the plain process: its largest distance from the expected one in some runs.

    Several runs that sum in other orders are a better measure than one, which may come near by chance.
    """
    return {
        name: max(float(norm(run[name].double() - tensor.double())) for run in plain)
        for name, tensor in expected.items()
    }


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
