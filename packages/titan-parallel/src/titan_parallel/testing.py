"""How equality of two runs is judged: gradients before clipping, each parameter by its own norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from titan_parallel.check.full_tensors import full_gradients, whole
from titan_parallel.check.tolerances import compare, norm_of, roundings

__all__ = ["check_same_gradients", "full_gradients", "whole"]


def check_same_gradients(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], plain: Sequence[Mapping[str, Tensor]] = ()
) -> None:
    """Raise AssertionError naming the first parameter whose gradient is not the expected one, and by which factor.

    The rule: `|g - g0| <= 1e-10 |g0| + 1e-13 |all g0|`, 2-norms over a parameter. `expected` is in fp64. Where `got` is
    of fp32 or bf16, give `plain`: the gradients of one or more runs of the plain process in the same precision (in
    several orders of rows, say). The rule is then ten times their rounding: see `titan_parallel.check.tolerances`.
    """
    if got.keys() != expected.keys():
        odd = sorted(got.keys() ^ expected.keys())
        raise AssertionError(
            f"Got gradients of {len(got)} parameters, expected {len(expected)}. Only one side has {', '.join(odd)}."
        )
    narrow = [name for name, reference in expected.items() if reference.dtype is not torch.float64]
    if narrow:
        raise ValueError(
            f"expected must be in float64, got {expected[narrow[0]].dtype} for {narrow[0]}. Run the plain process in "
            "float64; for gradients in another dtype give its runs in that dtype as plain."
        )
    norm_of_all, rounding = norm_of(expected.values()), roundings(plain, expected) if plain else {}
    for name, reference in expected.items():
        found = compare(got[name], reference, norm_of_all, rounding.get(name))
        if not found.same:
            raise AssertionError(
                f"The gradient of {name} differs by {found.error:.2e} of its norm (which is {found.share:.1e} of all), "
                f"{found.ratio:.3g} times what the rule allows. "
                f"Best factor: x{found.factor:.4g}, which leaves {found.rest:.2e}."
            )
