"""From what the ranks of a mesh say to the report on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from titan_parallel.check.factor import explain
from titan_parallel.check.forked import Failed
from titan_parallel.check.on_mesh import Judgement
from titan_parallel.check.plain import ReferenceRun
from titan_parallel.check.report import KINDS, Finding, Kind, MeshReport
from titan_parallel.check.tolerances import Comparison

Said = Comparison | str


def failed(name: str, degrees: str, num_ranks: int, why: Failed) -> MeshReport:
    """The report on a mesh where something was raised."""
    ranks = (
        "every rank"
        if len(why.ranks) == num_ranks
        else f"rank{'s' * (len(why.ranks) > 1)} {', '.join(map(str, why.ranks))}"
    )
    said = f"{why.kind}: {why.message}" if why.kind else why.message
    trace = why.trace if why.kind != "ConfigError" else ""  # which says all there is to say
    return MeshReport(name, degrees, num_ranks, {}, [], f"{ranks}: {said}", trace)


def summarize(
    name: str,
    degrees: str,
    judgements: Sequence[Judgement],
    record: ReferenceRun,
    copies: int,
    sizes: Mapping[str, int],
) -> MeshReport:
    """The report on a mesh where all ranks came to the end; `copies` ranks or more hold each parameter."""
    kinds, findings = {}, []
    for kind in KINDS:
        said = _by_quantity(getattr(judgement, kind) for judgement in judgements)
        if kind in ("gradients", "weights"):
            _add_missing(said, getattr(record, kind), judgements, record, copies)
            places = {parameter: place for place, parameter in enumerate(record.names)}
            said = dict(sorted(said.items(), key=lambda item: places.get(item[0], len(places))))
        worst = {quantity: max(map(_ratio, ranks.values())) for quantity, ranks in said.items()}
        different = [quantity for quantity, ratio in worst.items() if ratio > 1]
        name_of_worst = max(worst, key=lambda quantity: worst[quantity])
        kinds[kind] = Kind(len(worst), worst[name_of_worst], name_of_worst, len(different))
        findings += [_finding(kind, quantity, said[quantity], sizes) for quantity in different]
    return MeshReport(name, degrees, len(judgements), kinds, findings)


def _by_quantity(by_rank: Iterable[Mapping[str, Said]]) -> dict[str, dict[int, Said]]:
    said: dict[str, dict[int, Said]] = {}
    for rank, quantities in enumerate(by_rank):
        for quantity, comparison in quantities.items():
            said.setdefault(quantity, {})[rank] = comparison
    return said


def _add_missing(
    said: dict[str, dict[int, Said]],
    expected: Iterable[str],
    judgements: Sequence[Judgement],
    record: ReferenceRun,
    copies: int,
) -> None:
    """A parameter that too few ranks hold under its name: a stage holds its own, all others hold all."""
    for parameter in expected:
        without = [rank for rank, judgement in enumerate(judgements) if parameter not in judgement.weights]
        if record.names[parameter] == parameter and len(judgements) - len(without) < copies:
            said.setdefault(parameter, {}).update(dict.fromkeys(without, "no such parameter on the mesh"))


def _ratio(said: Said) -> float:
    return math.inf if isinstance(said, str) else said.ratio


def _finding(kind: str, quantity: str, said: Mapping[int, Said], sizes: Mapping[str, int]) -> Finding:
    """Told by the rank on which it differs most."""
    ranks = tuple(rank for rank, one in said.items() if _ratio(one) > 1)
    worst = max((said[rank] for rank in ranks), key=_ratio)
    if isinstance(worst, str):
        return Finding(kind, quantity, ranks, math.inf, f"cannot be compared: {worst}")
    words = f"differs by {worst.error:.2e} of its norm, {explain(worst, sizes)}"
    if worst.share < 1e-9:
        words = f"should be zero, and is {worst.error * worst.share:.2e} of the norm of all"
    return Finding(kind, quantity, ranks, worst.ratio, words)
