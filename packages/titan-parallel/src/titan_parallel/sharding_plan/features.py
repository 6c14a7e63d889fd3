"""Which features of a projection a tensor rank takes: a part of each of the projections that lie side by side in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Features:
    """Neighboring features that tensor ranks share in equal parts, or head by head.

    Where `repeats` and there are fewer heads than ranks, several ranks take the same head: each of its query heads
    finds its key-value head on its own rank.
    """

    count: int
    what: str = "features"
    heads: int | None = None
    repeats: bool = False

    def can_be_shared_by(self, size: int) -> bool:
        """Whether each of `size` ranks gets as many."""
        units = self.heads or self.count
        return units % size == 0 or (self.repeats and size % units == 0)

    def copies(self, size: int) -> int:
        """How many ranks take the same features."""
        return max(1, size // self.heads) if self.repeats and self.heads else 1

    def part(self, rank: int, size: int) -> tuple[int, int]:
        """Where a rank's features start and stop."""
        copies = self.copies(size)
        width = self.count * copies // size
        return rank // copies * width, (rank // copies + 1) * width


def side_by_side(count: int, options: Mapping[str, Any]) -> list[Features]:
    """The projections in one of `count` output features, by the options of its role.

    `packed` is their number (1). They are of one size, or, with both kinds of heads, the first holds `num_heads` heads
    and each of the others `num_kv_heads`, all of one width.
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
    """Where the parts that a rank takes of projections side by side start and stop."""
    taken, before = [], 0
    for projection in features:
        start, stop = projection.part(rank, size)
        taken.append((before + start, before + stop))
        before += projection.count
    return taken
