"""How equality of two runs is judged: gradients before clipping, each parameter by its own norm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from titan_parallel._torch import is_dtensor
from titan_parallel.equality import TOLERANCES, compare, norm_of

__all__ = ["TOLERANCES", "check_same_gradients", "full_gradients", "whole"]


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient, whole, by the name of its parameter. On a mesh all ranks call this, and each gets all of them."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor that may be spread over ranks; all of them call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).clone()  # type: ignore[attr-defined]


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
    norm_of_all = norm_of(expected.values())
    for name, reference in expected.items():
        found = compare(got[name], reference, norm_of_all, tolerances)
        if not found.same:
            raise AssertionError(
                f"The gradient of {name} differs by {found.error:.2e} of its norm (which is {found.share:.1e} of all). "
                f"Best factor: x{found.factor:.4g}, which leaves {found.rest:.2e}."
            )
