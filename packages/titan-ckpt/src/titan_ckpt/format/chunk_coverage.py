"""Boxes that fill a larger one exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and the sizes of a box."""

_MOST_DIMS_CUT = 8  # a mesh has five axes; each dim doubles the corners


def misfit(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """Return what is wrong with `boxes` as the mappings of a tensor of `shape`: empty when they fill it exactly once.

    Boxes fill a shape without gap or overlap when, and only when, their corners (with alternating signs) add up to
    those of the shape: the signed corners determine how often each point is covered. Time: boxes x 2^dims cut.
    """
    if not boxes:
        return "no chunks"
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return f"a chunk of {len(sizes)} dims at {list(offsets)}"
        inside = all(
            offset >= 0 and (size > 0 or whole == 0) and offset + size <= whole
            for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            return f"a chunk of {list(sizes)} at {list(offsets)}"
    if 0 in shape:
        return ""
    cut = [dim for dim, whole in enumerate(shape) if any(sizes[dim] != whole for _, sizes in boxes)]
    if len(cut) > _MOST_DIMS_CUT:
        return f"chunks that are cut along {len(cut)} dims"
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        _add_corners(corners, [(offsets[dim], offsets[dim] + sizes[dim]) for dim in cut], 1)
    _add_corners(corners, [(0, shape[dim]) for dim in cut], -1)
    return "chunks with a gap or an overlap" if any(corners.values()) else ""


def _add_corners(corners: Counter[tuple[int, ...]], ends: Sequence[tuple[int, int]], sign: int) -> None:
    for which in product((0, 1), repeat=len(ends)):
        corner = tuple(pair[upper] for pair, upper in zip(ends, which, strict=True))
        corners[corner] += sign * (-1) ** sum(which)
