"""The tolerance within which tensors of two runs are equal, and measures of their difference.

In fp64: `|g - g0| <= 1e-10 |g0| + 1e-13 |all|`, with 2-norms of a tensor and of all tensors of its kind. The second
term is for gradients that are zero up to rounding.

In fp32 and bf16 no fixed numbers hold for every model and every CPU. There `g0` is computed in fp64, and the rounding
error of the single-process run is measured: `|g - g0| <= 10 (|p - g0| + u |g0|)`, where `p` is the single-process
result in the dtype of `g`, and `u` is the unit roundoff of that dtype. For a gradient that is zero up to rounding, the
tolerance is ten times the norm of its single-process value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OF_ITSELF, OF_ALL = 1e-10, 1e-13
"""In fp64, the tolerance as fractions of the tensor's own norm and of the norm of all tensors of its kind."""
MULTIPLE = 10
"""In fp32 and bf16, the tolerance as a multiple of the rounding error of the single-process run."""


@dataclass(frozen=True)
class Comparison:
    """Measures of the difference between a tensor and the expected one."""

    ratio: float
    """Error / tolerance: equal if at most 1; infinite for a tensor that is not finite."""
    error: float
    """Error / expected norm."""
    share: float
    """Expected norm / norm of all tensors of this kind."""
    factor: float
    """The best-fit factor to the expected tensor: <g, g0> / <g0, g0>."""
    rest: float
    """Remaining error after the best-fit factor / expected norm."""

    @property
    def same(self) -> bool:
        """True if the error is within the tolerance."""
        return self.ratio <= 1


def compare(got: Tensor, expected: Tensor, norm_of_all: Tensor, rounding: float | None = None) -> Comparison:
    """Compare `got` with the expected tensor of the same shape, which is fp64.

    `rounding` is the rounding error of the single-process run (see `roundings`), for a `got` that was computed in fp32
    or bf16. `norm_of_all` is the norm of all expected tensors of this kind.
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
    """Return the rounding error of each tensor: the largest distance of the `plain` runs from `expected`.

    `plain` are single-process runs in the narrower dtype. Several that add in different orders are a better measure
    than one, which may be close by chance.
    """
    return {
        name: max(float(norm(run[name].double() - tensor.double())) for run in plain)
        for name, tensor in expected.items()
    }


def norm(tensor: Tensor) -> Tensor:
    """Return the 2-norm, accumulated in fp64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of several tensors together."""
    return torch.stack([norm(tensor) for tensor in tensors]).norm()


def _quotient(numerator: Tensor, denominator: Tensor) -> float:
    """Divide; 0 / 0 is 0, and NaN (from a tensor that is not finite) becomes infinity."""
    if numerator == 0:
        return 0.0
    quotient = float(numerator / denominator)
    return math.inf if math.isnan(quotient) else quotient
