"""Check that the chunks of a tensor cover it exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a box."""

_MAX_SPLIT_DIMS = 8  # a mesh has five axes; each split dim doubles the number of corners


def find_coverage_error(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """Return why `boxes` are not the chunks of a tensor of `shape`, or an empty string if they cover it exactly once.

    Boxes cover a shape without gap or overlap if and only if their corners, with alternating signs, add up to those of
    the shape: the signed corners determine how often each element is covered. Time: number of boxes x 2^(number of
    split dims).
    """
    if not boxes:
        return "no chunks"
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return f"a chunk with {len(sizes)} dims at {list(offsets)}"
        is_inside = all(
            offset >= 0 and (size > 0 or full == 0) and offset + size <= full
            for offset, size, full in zip(offsets, sizes, shape, strict=True)
        )
        if not is_inside:
            return f"a chunk of {list(sizes)} at {list(offsets)}"
    if 0 in shape:
        return ""
    split_dims = [dim for dim, full in enumerate(shape) if any(sizes[dim] != full for _, sizes in boxes)]
    if len(split_dims) > _MAX_SPLIT_DIMS:
        return f"chunks that are split along {len(split_dims)} dims (at most {_MAX_SPLIT_DIMS} are supported)"
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        _add_corners(corners, [(offsets[dim], offsets[dim] + sizes[dim]) for dim in split_dims], 1)
    _add_corners(corners, [(0, shape[dim]) for dim in split_dims], -1)
    return "chunks with a gap or an overlap" if any(corners.values()) else ""


def _add_corners(corners: Counter[tuple[int, ...]], ends: Sequence[tuple[int, int]], sign: int) -> None:
    for which in product((0, 1), repeat=len(ends)):
        corner = tuple(pair[upper] for pair, upper in zip(ends, which, strict=True))
        corners[corner] += sign * (-1) ** sum(which)
