"""Compare the gradients of two runs before clipping, each parameter relative to its own norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from titan_parallel.check.full_tensors import full_gradients, whole
from titan_parallel.check.tolerances import compare, norm_of, roundings

__all__ = ["check_same_gradients", "compare", "full_gradients", "norm_of", "roundings", "whole"]


def check_same_gradients(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], plain: Sequence[Mapping[str, Tensor]] = ()
) -> None:
    """Raise AssertionError naming the first parameter whose gradient differs from the expected one, and the factor.

    The tolerance is `|g - g0| <= 1e-10 |g0| + 1e-13 |all g0|`, with 2-norms over a parameter. `expected` is in fp64.
    If `got` comes from an fp32 or bf16 run, pass `plain`: the gradients of one or more single-process runs in the same
    precision (for example with the samples in different orders). The tolerance is then ten times their rounding error:
    see `titan_parallel.check.tolerances`.
    """
    if got.keys() != expected.keys():
        odd = sorted(got.keys() ^ expected.keys())
        raise AssertionError(
            f"Both sides must have gradients of the same parameters, got {len(got)} and expected {len(expected)}. "
            f"Only one side has {', '.join(odd)}."
        )
    narrow = [name for name, reference in expected.items() if reference.dtype is not torch.float64]
    if narrow:
        raise ValueError(
            f"expected must be in float64, got {expected[narrow[0]].dtype} for {narrow[0]}. Run the single process in "
            "float64; to check gradients in another dtype, pass its runs in that dtype as plain."
        )
    norm_of_all, rounding = norm_of(expected.values()), roundings(plain, expected) if plain else {}
    for name, reference in expected.items():
        found = compare(got[name], reference, norm_of_all, rounding.get(name))
        if not found.same:
            raise AssertionError(
                f"The gradient of {name} differs by {found.error:.2e} of its norm (which is {found.share:.1e} of the "
                f"norm of all gradients), {found.ratio:.3g} times the tolerance. "
                f"Best-fit factor: x{found.factor:.4g}, with a remaining error of {found.rest:.2e}."
            )
