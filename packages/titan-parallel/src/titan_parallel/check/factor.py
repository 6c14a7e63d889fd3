"""What a wrong factor says: the degree, or the product of degrees, by which a gradient is too large or too small."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from titan_parallel.check.tolerances import Comparison
from titan_parallel.mesh.parallel_dims import ParallelDims

_CLOSE = 1e-4
"""How near a factor is to a simple one, and how little is left beside it."""


def sizes_of(config: ParallelDims.Config, num_ranks: int, num_microbatches: int) -> dict[str, int]:
    """The numbers of a run that a gradient may be wrong by."""
    sizes = {
        "the tensor degree": config.tensor_parallel_degree,
        "the context degree": config.context_parallel_degree,
        "the pipeline degree": config.pipeline_parallel_degree,
        "the replicate degree": config.data_parallel_replicate_degree,
    }
    sizes["the shard degree"] = num_ranks // math.prod(sizes.values())
    if 1 in (sizes["the replicate degree"], sizes["the shard degree"]):
        sizes["the data degree"] = sizes.pop("the replicate degree") * sizes.pop("the shard degree")
    sizes["the number of micro-batches"] = num_microbatches
    return {name: size for name, size in sizes.items() if size > 1}


def explain(found: Comparison, sizes: Mapping[str, int]) -> str:
    """The factor and its meaning: "x2.0: the tensor degree"."""
    if not math.isfinite(found.factor) or found.rest > _CLOSE:
        return "no simple factor"
    if abs(found.factor) <= _CLOSE:
        return "x0: nothing arrives"
    size, sign = abs(found.factor), "" if found.factor > 0 else "minus "
    if abs(size - 1) <= _CLOSE:
        return "x1.0, but for a small rest" if found.factor > 0 else "x-1.0: the sign is turned"
    meanings = _meanings(sizes, size) or [f"the square root of {words}" for words in _meanings(sizes, size**2)]
    return f"x{_short(found.factor)}: {sign}{' or '.join(meanings) or 'no degree of this mesh'}"


def _meanings(sizes: Mapping[str, int], value: float) -> list[str]:
    return _products(sizes, value) or [f"1 / {words}" for words in _products(sizes, 1 / value)]


def _products(sizes: Mapping[str, int], value: float) -> list[str]:
    """The products of degrees that are `value`, of as few as possible."""
    for count in range(1, len(sizes) + 1):
        chosen = itertools.combinations(sizes, count)
        found = [names for names in chosen if math.isclose(math.prod(sizes[n] for n in names), value, rel_tol=_CLOSE)]
        if found:
            return [" x ".join(names) for names in found]
    return []


def _short(factor: float) -> str:
    return f"{factor:.1f}" if abs(factor - round(factor)) <= _CLOSE else f"{factor:.4g}"
