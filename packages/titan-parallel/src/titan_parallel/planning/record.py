"""What one simulated step of one rank gave, as numbers that grow evenly with blocks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titan_parallel.planning.timeline import CATEGORIES, Place
from titan_parallel.planning.traffic import Key

NEARLY = 0.8

Numbers = dict[Any, int]


@dataclass(frozen=True)
class PipelineRank:
    """What makes ranks of a pipeline alike, or not."""

    blocks: list[range]
    """Of each of its stages."""
    under_way: int
    """Forwards that wait for their backwards, at most."""


@dataclass(frozen=True)
class StepRecord:
    """Bytes, counts and FLOPs of one rank."""

    sizes: Numbers
    """The bytes of parameters, gradients, optimizer, and of activations at their most."""
    flops: Numbers
    """full and causal, of the forwards of a step."""
    calls: dict[Key, int]
    traffic: dict[Key, int]
    """(axis, kind) -> how many collectives, and their bytes."""
    peaks: dict[tuple[Place, str], int]
    """(place, category) -> bytes, when there was most memory after an allocation at that place."""
    bubble: float | None
    """The share of a step in which ranks of the pipeline wait."""
    pipeline: list[PipelineRank]
    """All ranks of the pipeline; nothing where there is none."""

    def peak(self) -> tuple[Place, dict[str, int]]:
        """Where there was most memory of all, and what for."""
        places = {place for place, _ in self.peaks}
        by_place = {place: {name: self.peaks[place, name] for name in CATEGORIES} for place in places}
        return max(by_place.items(), key=lambda item: (sum(item[1].values()), item[0]))

    def extended(self, before: StepRecord, times: int) -> StepRecord | None:
        """This record and `times` more of what it has over `before`; None if the two are not of the same things."""
        return self.towards(before, -times, 1)

    def towards(self, other: StepRecord, part: int, whole: int) -> StepRecord | None:
        """The record that lies `part / whole` of the way to `other`; None if the two are not of the same things.

        A place that only one of them has is no matter where memory was far from full.
        """
        values: dict[str, Numbers] = {}
        for name in ("sizes", "flops", "calls", "traffic", "peaks"):
            mine, others = getattr(self, name), getattr(other, name)
            if name == "peaks":
                if self._is_full_where(other) or other._is_full_where(self):
                    return None
                mine = {key: size for key, size in mine.items() if key in others}
            elif mine.keys() != others.keys():
                return None
            values[name] = {key: size + part * (others[key] - size) // whole for key, size in mine.items()}
        return StepRecord(**values, bubble=self.bubble, pipeline=self.pipeline)

    def agrees_with(self, other: StepRecord) -> bool:
        """Whether all that a plan says of a rank is the same."""
        names = ("sizes", "flops", "calls", "traffic")
        return self.peak() == other.peak() and all(getattr(self, name) == getattr(other, name) for name in names)

    def _is_full_where(self, other: StepRecord) -> bool:
        """Whether memory is nearly as full as it gets at a place that `other` does not have."""
        totals: Counter[Place] = Counter()
        for (place, _), size in self.peaks.items():
            totals[place] += size
        known = {place for place, _ in other.peaks}
        return any(place not in known and size > NEARLY * max(totals.values()) for place, size in totals.items())


def extrapolated(
    simulate: Callable[[int], StepRecord | None], small: int, period: int, wanted: int
) -> StepRecord | None:
    """The record for `wanted` things from those for `small` and `small + period`; None where they do not compare."""
    before, after = simulate(small), simulate(small + period)
    if before is None or after is None:
        return None
    return after.extended(before, (wanted - small - period) // period)
