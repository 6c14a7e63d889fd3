"""Merge the results of all ranks of a mesh into its report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from titan_parallel.check.factor import explain
from titan_parallel.check.forked import Failed
from titan_parallel.check.on_mesh import RankResult
from titan_parallel.check.reference import ReferenceRun
from titan_parallel.check.report import KINDS, Finding, Kind, MeshReport
from titan_parallel.check.tolerances import Comparison

Outcome = Comparison | str
"""A comparison, or the reason why there is none."""


def failed(name: str, degrees: str, num_ranks: int, failure: Failed) -> MeshReport:
    """Return the report of a mesh on which an error was raised."""
    ranks = (
        "all ranks"
        if len(failure.ranks) == num_ranks
        else f"rank{'s' * (len(failure.ranks) > 1)} {', '.join(map(str, failure.ranks))}"
    )
    message = f"{failure.kind}: {failure.message}" if failure.kind else failure.message
    trace = failure.trace if failure.kind != "ConfigError" else ""  # the message of a ConfigError is enough
    return MeshReport(name, degrees, num_ranks, {}, [], f"{ranks}: {message}", trace)


def summarize(
    name: str,
    degrees: str,
    results: Sequence[RankResult],
    reference: ReferenceRun,
    copies: int,
    sizes: Mapping[str, int],
) -> MeshReport:
    """Return the report of a mesh on which all ranks completed; each parameter must be on at least `copies` ranks."""
    kinds, findings = {}, []
    for kind in KINDS:
        outcomes = _by_quantity(getattr(result, kind) for result in results)
        if kind in ("gradients", "weights"):
            _add_missing(outcomes, getattr(reference, kind), results, reference, copies)
            order = {parameter: index for index, parameter in enumerate(reference.names)}
            outcomes = dict(sorted(outcomes.items(), key=lambda item: order.get(item[0], len(order))))
        worst = {quantity: max(map(_ratio, by_rank.values())) for quantity, by_rank in outcomes.items()}
        different = [quantity for quantity, ratio in worst.items() if ratio > 1]
        name_of_worst = max(worst, key=lambda quantity: worst[quantity])
        kinds[kind] = Kind(len(worst), worst[name_of_worst], name_of_worst, len(different))
        findings += [_finding(kind, quantity, outcomes[quantity], sizes) for quantity in different]
    return MeshReport(name, degrees, len(results), kinds, findings)


def _by_quantity(by_rank: Iterable[Mapping[str, Outcome]]) -> dict[str, dict[int, Outcome]]:
    """Return {quantity: {rank: outcome}}."""
    outcomes: dict[str, dict[int, Outcome]] = {}
    for rank, quantities in enumerate(by_rank):
        for quantity, outcome in quantities.items():
            outcomes.setdefault(quantity, {})[rank] = outcome
    return outcomes


def _add_missing(
    outcomes: dict[str, dict[int, Outcome]],
    expected: Iterable[str],
    results: Sequence[RankResult],
    reference: ReferenceRun,
    copies: int,
) -> None:
    """Add parameters that too few ranks hold under their name: those of a stage are on its ranks, others on all."""
    for parameter in expected:
        without = [rank for rank, result in enumerate(results) if parameter not in result.weights]
        if reference.names[parameter] == parameter and len(results) - len(without) < copies:
            outcomes.setdefault(parameter, {}).update(dict.fromkeys(without, "no such parameter on the mesh"))


def _ratio(outcome: Outcome) -> float:
    return math.inf if isinstance(outcome, str) else outcome.ratio


def _finding(kind: str, quantity: str, by_rank: Mapping[int, Outcome], sizes: Mapping[str, int]) -> Finding:
    """Return the finding as reported by the rank with the largest error."""
    ranks = tuple(rank for rank, outcome in by_rank.items() if _ratio(outcome) > 1)
    worst = max((by_rank[rank] for rank in ranks), key=_ratio)
    if isinstance(worst, str):
        return Finding(kind, quantity, ranks, math.inf, f"cannot be compared: {worst}")
    words = f"differs by {worst.error:.2e} of its norm, {explain(worst, sizes)}"
    if worst.share < 1e-9:
        words = f"must be zero, and has {worst.error * worst.share:.2e} of the norm of all {kind}"
    return Finding(kind, quantity, ranks, worst.ratio, words)
