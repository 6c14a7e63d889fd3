"""Output features of a (possibly packed) projection, and the slices of them that each tensor-parallel rank takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Features:
    """Consecutive features that tensor-parallel ranks split evenly; with `heads`, in whole heads.

    With `repeats` (key-value heads) and fewer heads than ranks, several ranks take the same head, so that the key-value
    head of each query head is on the same rank.
    """

    count: int
    what: str = "features"
    heads: int | None = None
    repeats: bool = False

    def can_be_shared_by(self, size: int) -> bool:
        """Return whether the features can be split evenly over `size` ranks."""
        units = self.heads or self.count
        return units % size == 0 or (self.repeats and size % units == 0)

    def copies(self, size: int) -> int:
        """Return the number of ranks that take the same features."""
        return max(1, size // self.heads) if self.repeats and self.heads else 1

    def part(self, rank: int, size: int) -> tuple[int, int]:
        """Return where the features of `rank` start and stop."""
        copies = self.copies(size)
        width = self.count * copies // size
        return rank // copies * width, (rank // copies + 1) * width


def side_by_side(count: int, options: Mapping[str, Any]) -> list[Features]:
    """Return the projections that are packed in a projection of `count` output features, by the options of its role.

    The option `packed` is their number (default 1). They have equal sizes; or, with both `num_heads` and
    `num_kv_heads`, the first has `num_heads` heads and each of the others `num_kv_heads`, all of the same head width.
    """
    packed = options.get("packed", 1)
    kinds = [kind for kind in ("num_heads", "num_kv_heads") if kind in options]
    if not kinds:
        return [Features(count // packed)] * packed
    kinds = [kinds[0], *kinds[-1:] * (packed - 1)]
    width = count // sum(options[kind] for kind in kinds)
    return [
        Features(options[kind] * width, kind, heads=options[kind], repeats=kind == "num_kv_heads") for kind in kinds
    ]


def parts(features: list[Features], rank: int, size: int) -> list[tuple[int, int]]:
    """Return where the slices that `rank` takes of packed projections start and stop, one for each projection."""
    taken, before = [], 0
    for projection in features:
        start, stop = projection.part(rank, size)
        taken.append((before + start, before + stop))
        before += projection.count
    return taken
