"""The report of a check, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KINDS = {"gradients": "the gradient of ", "norms": "the ", "losses": "the ", "weights": "the weight "}
"""Kinds of compared quantities, in order, and the words before the name of one."""


@dataclass(frozen=True)
class Finding:
    """One quantity that differs from that of the single-process run."""

    kind: str
    """gradients, norms, losses or weights."""
    name: str
    ranks: tuple[int, ...]
    """Ranks on which the quantity differs."""
    ratio: float
    """The largest error divided by the tolerance; infinite if there is nothing to compare."""
    words: str
    """The difference in words, with the factor."""


@dataclass(frozen=True)
class Kind:
    """Statistics of one kind of quantities: how many were compared, how many differ, and the largest error."""

    count: int
    worst: float
    """The largest error divided by the tolerance; above 1 the quantity differs."""
    worst_name: str
    num_different: int


@dataclass(frozen=True)
class MeshReport:
    """The result for one mesh."""

    name: str
    degrees: str
    num_ranks: int
    kinds: Mapping[str, Kind]
    findings: Sequence[Finding]
    """All differences: gradients in the order of the model's parameters, then norms, losses and weights."""
    failure: str | None = None
    """The error that ended the run, with its ranks; None if the run completed."""
    trace: str = ""
    """The traceback of the lowest of these ranks."""

    @property
    def ok(self) -> bool:
        """True if the run completed and every quantity matches the single-process run."""
        return self.failure is None and not self.findings

    def __str__(self) -> str:
        title = f"{self.name} ({self.degrees}; {self.num_ranks} rank{'s' * (self.num_ranks > 1)})"
        if self.failure is not None:
            return f"{title}: FAILED\n  {self.failure}"
        lines = [f"{title}: {'ok' if self.ok else 'DIFFERS'}"]
        if self.findings:
            first = self.findings[0]
            lines.append(f"  first: {KINDS[first.kind]}{first.name} on {self._ranks(first.ranks)} {first.words}")
        lines += [f"  {self._line(name, kind)}" for name, kind in self.kinds.items()]
        return "\n".join(lines)

    def _line(self, name: str, kind: Kind) -> str:
        counts = f"{kind.num_different} of {kind.count} {name} differ" if kind.num_different else f"{kind.count} {name}"
        return f"{counts}; worst: {kind.worst:.2g} of the tolerance ({kind.worst_name})"

    def _ranks(self, ranks: tuple[int, ...]) -> str:
        if len(ranks) == self.num_ranks:
            return "all ranks"
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class CheckReport:
    """The result of `check_parallel`. `str(report)` is for people, `report.to_dict()` is JSON data."""

    meshes: Mapping[str, MeshReport]

    @property
    def ok(self) -> bool:
        """True if every mesh matches the single-process run."""
        return all(mesh.ok for mesh in self.meshes.values())

    def raise_for_failure(self) -> None:
        """Raise AssertionError with the whole report if any mesh differs or failed."""
        if not self.ok:
            raise AssertionError(f"Training on a mesh must match training in one process.\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data; infinite numbers and NaN become None."""
        return {"ok": self.ok, "meshes": {name: {"ok": m.ok, **_json(asdict(m))} for name, m in self.meshes.items()}}

    def __str__(self) -> str:
        matching = sum(mesh.ok for mesh in self.meshes.values())
        total = f"{matching} of {len(self.meshes)} meshes match the single-process run"
        return "\n".join([*map(str, self.meshes.values()), total])


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
