"""Explain a wrong factor of a gradient: by the size of a mesh axis, or a product of sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from titan_parallel.check.tolerances import Comparison
from titan_parallel.mesh.parallel_dims import ParallelDims

_CLOSE = 1e-4
"""Relative tolerance of a simple factor, and of the remaining error."""


def sizes_of(config: ParallelDims.Config, num_ranks: int, num_microbatches: int) -> dict[str, int]:
    """Return {name: size} of the mesh axes and `num_microbatches`: the usual wrong factors. Sizes of 1 are left out."""
    sizes = {
        "tp_size": config.tensor_parallel_degree,
        "cp_size": config.context_parallel_degree,
        "pp_size": config.pipeline_parallel_degree,
        "dp_replicate_size": config.data_parallel_replicate_degree,
    }
    sizes["dp_shard_size"] = num_ranks // math.prod(sizes.values())
    if 1 in (sizes["dp_replicate_size"], sizes["dp_shard_size"]):
        sizes["dp_size"] = sizes.pop("dp_replicate_size") * sizes.pop("dp_shard_size")
    sizes["num_microbatches"] = num_microbatches
    return {name: size for name, size in sizes.items() if size > 1}


def explain(found: Comparison, sizes: Mapping[str, int]) -> str:
    """Return the factor and its explanation, such as "x2.0: tp_size"."""
    if not math.isfinite(found.factor) or found.rest > _CLOSE:
        return "no simple factor"
    if abs(found.factor) <= _CLOSE:
        return "x0: the value is zero"
    size, sign = abs(found.factor), "" if found.factor > 0 else "minus "
    if abs(size - 1) <= _CLOSE:
        return "x1.0, with a small remaining error" if found.factor > 0 else "x-1.0: the sign is flipped"
    explanations = _explanations(sizes, size) or [f"sqrt({name})" for name in _explanations(sizes, size**2)]
    return f"x{_short(found.factor)}: {sign}{' or '.join(explanations) or 'matches no size of this mesh'}"


def _explanations(sizes: Mapping[str, int], value: float) -> list[str]:
    return _products(sizes, value) or [f"1 / {name}" for name in _products(sizes, 1 / value)]


def _products(sizes: Mapping[str, int], value: float) -> list[str]:
    """Return the products of sizes that equal `value`, with as few factors as possible."""
    for count in range(1, len(sizes) + 1):
        chosen = itertools.combinations(sizes, count)
        found = [names for names in chosen if math.isclose(math.prod(sizes[n] for n in names), value, rel_tol=_CLOSE)]
        if found:
            return [" x ".join(names) for names in found]
    return []


def _short(factor: float) -> str:
    return f"{factor:.1f}" if abs(factor - round(factor)) <= _CLOSE else f"{factor:.4g}"
