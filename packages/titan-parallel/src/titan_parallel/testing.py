"""How equality of two runs is judged: gradients before clipping, each parameter by its own norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from titan_parallel._torch import is_dtensor

TOLERANCES = {torch.float64: (1e-10, 1e-13), torch.float32: (1e-6, 1e-8)}
"""dtype -> (share of a gradient's own norm, share of the norm of all gradients) by which it may differ."""


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient, whole, by the name of its parameter. On a mesh all ranks call this, and each gets all of them."""
    return {name: _whole(p.grad).detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same_gradients(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerances: tuple[float, float] | None = None
) -> None:
    """Raise AssertionError naming the first parameter whose gradient is not the expected one, and by which factor.

    The rule: `|g - g0| <= a |g0| + b |all g0|`, 2-norms over a parameter, with (a, b) from `TOLERANCES` for its dtype.
    The second term is for gradients that are zero but for rounding.
    """
    if got.keys() != expected.keys():
        odd = sorted(got.keys() ^ expected.keys())
        raise AssertionError(
            f"Got gradients of {len(got)} parameters, expected {len(expected)}. Only one side has {', '.join(odd)}."
        )
    norm_of_all = torch.stack([_norm(gradient) for gradient in expected.values()]).norm()
    for name, reference in expected.items():
        own, of_all = tolerances or TOLERANCES[reference.dtype]
        error, norm = _norm(got[name].double() - reference.double()), _norm(reference)
        if not error <= own * norm + of_all * norm_of_all:
            factor = (got[name].double() * reference.double()).sum() / norm.square()
            rest = _norm(got[name].double() - factor * reference.double()) / norm
            raise AssertionError(
                f"The gradient of {name} differs by {float(error / norm):.2e} of its norm "
                f"(which is {float(norm / norm_of_all):.1e} of all). Best factor: x{float(factor):.4g}, which leaves "
                f"{float(rest):.2e}."
            )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)
