"""The result of a simulated step of one rank: numbers that grow linearly with blocks and with micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titan_parallel.planning.timeline import CATEGORIES, Site
from titan_parallel.planning.traffic import Key

NEAR_PEAK = 0.8
"""The fraction of the peak above which an allocation site counts as near it."""

Numbers = dict[Any, int]


@dataclass(frozen=True)
class PipelineRank:
    """The properties by which ranks of a pipeline are equivalent or not."""

    blocks: list[range]
    """The blocks of each of its stages."""
    in_flight: int
    """The largest number of forwards that wait for their backwards."""


@dataclass(frozen=True)
class StepRecord:
    """Bytes, counts and FLOPs of one rank in one step."""

    sizes: Numbers
    """Bytes of parameters, gradients and optimizer state, and the peak of activations."""
    flops: Numbers
    """"full" and "causal", of the forwards of a step."""
    calls: dict[Key, int]
    """(axis, kind) -> number of collectives."""
    traffic: dict[Key, int]
    """(axis, kind) -> their bytes."""
    peaks: dict[tuple[Site, str], int]
    """(site, category) -> bytes, at the moment of the highest total after an allocation at that site."""
    bubble: float | None
    """The fraction of a step in which ranks of the pipeline are idle."""
    pipeline: list[PipelineRank]
    """All ranks of the pipeline; empty without one."""

    def peak(self) -> tuple[Site, dict[str, int]]:
        """Return the site of the highest total, and its bytes by category."""
        sites = {site for site, _ in self.peaks}
        by_site = {site: {name: self.peaks[site, name] for name in CATEGORIES} for site in sites}
        return max(by_site.items(), key=lambda item: (sum(item[1].values()), item[0]))

    def extrapolated(self, before: StepRecord, times: int) -> StepRecord | None:
        """Return this record plus `times` its difference from `before`; None if their keys differ."""
        return self.interpolated(before, -times, 1)

    def interpolated(self, other: StepRecord, numerator: int, denominator: int) -> StepRecord | None:
        """Return the record at `numerator / denominator` of the way from this one to `other`.

        None if their keys differ. A site that only one of them has is ignored where memory was far below the peak.
        """
        values: dict[str, Numbers] = {}
        for name in ("sizes", "flops", "calls", "traffic", "peaks"):
            mine, others = getattr(self, name), getattr(other, name)
            if name == "peaks":
                if self._is_near_peak_outside(other) or other._is_near_peak_outside(self):
                    return None
                mine = {key: size for key, size in mine.items() if key in others}
            elif mine.keys() != others.keys():
                return None
            values[name] = {key: size + numerator * (others[key] - size) // denominator for key, size in mine.items()}
        return StepRecord(**values, bubble=self.bubble, pipeline=self.pipeline)

    def agrees_with(self, other: StepRecord) -> bool:
        """Return whether everything that the report shows of a rank is equal."""
        names = ("sizes", "flops", "calls", "traffic")
        return self.peak() == other.peak() and all(getattr(self, name) == getattr(other, name) for name in names)

    def _is_near_peak_outside(self, other: StepRecord) -> bool:
        """Return whether memory is near its peak at a site that `other` does not have."""
        totals: Counter[Site] = Counter()
        for (site, _), size in self.peaks.items():
            totals[site] += size
        known = {site for site, _ in other.peaks}
        return any(site not in known and size > NEAR_PEAK * max(totals.values()) for site, size in totals.items())


def extrapolate(
    simulate: Callable[[int], StepRecord | None], small: int, period: int, wanted: int
) -> StepRecord | None:
    """Return the record for `wanted` blocks or micro-batches from those for `small` and for `small + period`.

    None if the keys of the two records differ.
    """
    before, after = simulate(small), simulate(small + period)
    if before is None or after is None:
        return None
    return after.extrapolated(before, (wanted - small - period) // period)
