"""What a check found, to read and to compute with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KINDS = {"gradients": "the gradient of ", "norms": "the ", "losses": "the ", "weights": "the weight "}
"""What is judged, in this order, and how one of them is called."""


@dataclass(frozen=True)
class Finding:
    """One quantity that is not what the plain model has."""

    kind: str
    """gradients, norms, losses or weights."""
    name: str
    ranks: tuple[int, ...]
    """On which it differs."""
    ratio: float
    """The largest error over what the rule allows; infinite where there is nothing to compare."""
    words: str
    """By how much it differs, and by which factor."""


@dataclass(frozen=True)
class Kind:
    """How many quantities of a kind were compared on each rank, and the worst of them."""

    count: int
    worst: float
    """Its error over what the rule allows; more than 1 differs."""
    worst_name: str
    num_different: int


@dataclass(frozen=True)
class MeshReport:
    """What was found on one mesh."""

    name: str
    degrees: str
    num_ranks: int
    kinds: Mapping[str, Kind]
    findings: Sequence[Finding]
    """All that differs: gradients in the model's order, then norms, losses and weights."""
    failure: str | None = None
    """What was raised where the run did not come to its end, and on which ranks."""
    trace: str = ""
    """The traceback of the first of these ranks."""

    @property
    def ok(self) -> bool:
        """Whether everything is what the plain model has."""
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
        words = f"{kind.num_different} of {kind.count} {name} differ" if kind.num_different else f"{kind.count} {name}"
        return f"{words}; worst: {kind.worst:.2g} of what the rule allows ({kind.worst_name})"

    def _ranks(self, ranks: tuple[int, ...]) -> str:
        if len(ranks) == self.num_ranks:
            return "every rank"
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class CheckReport:
    """What `check_parallel` returns."""

    meshes: Mapping[str, MeshReport]

    @property
    def ok(self) -> bool:
        """Whether every mesh gives what the plain model gives."""
        return all(mesh.ok for mesh in self.meshes.values())

    def raise_for_failure(self) -> None:
        """Raise AssertionError with the whole report if anything differs."""
        if not self.ok:
            raise AssertionError(f"Not the same run on every mesh.\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; what is infinite or no number is None."""
        return {"ok": self.ok, "meshes": {name: {"ok": m.ok, **_json(asdict(m))} for name, m in self.meshes.items()}}

    def __str__(self) -> str:
        agreeing = sum(mesh.ok for mesh in self.meshes.values())
        total = f"{agreeing} of {len(self.meshes)} meshes give what one process gives"
        return "\n".join([*map(str, self.meshes.values()), total])


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
