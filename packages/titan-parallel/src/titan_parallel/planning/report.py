"""The result of a dry run, as plain data and as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from titan_parallel.planning.sizes import show_bytes, show_count


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: the ranks along it, for the first rank, and the number of nodes that they span."""

    name: str
    size: int
    ranks: list[int]
    nodes: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products and attention, forward and backward, over all ranks, without recomputation.

    `full` counts every pair of query and key, `causal` the half that a causal mask leaves.
    """

    full_per_token: int
    causal_per_token: int
    full_per_step: int
    causal_per_step: int


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind along one axis, of one rank in one step; bytes are those of the larger side of each."""

    axis: str
    kind: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline (the whole model without a pipeline): bytes of one of its ranks.

    `at_peak` holds the bytes of each category at the peak; they add up to `peak`. `activations` is the peak of the
    tensors that forwards save for backwards.
    """

    stage: int
    rank: int
    num_ranks: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    peak_in: str
    at_peak: dict[str, int]
    collectives: list[Collective]


@dataclass(frozen=True)
class Suggestion:
    """A change of the settings, and the peak of the changed run in bytes."""

    change: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The result of a dry run. `str(plan)` is a report of about one screen, `plan.to_json()` has all fields."""

    model: str
    num_parameters: int
    world_size: int
    ranks_per_node: int
    mesh: list[Axis]
    local_batch_size: int
    """Sequences of a micro-batch."""
    num_batches: int
    """Micro-batches of each data rank in a step."""
    tokens_per_step: int
    """Tokens of all data ranks."""
    flops: Flops
    stages: list[Stage]
    bubble: float | None
    """The fraction of a step in which ranks wait for other stages; None without a pipeline."""
    compiled: bool
    """True if blocks are compiled. They are simulated as eager ones, which save no fewer activations."""
    device_memory: int | None
    """Bytes of one device; None if not given."""
    suggestions: list[Suggestion]
    """Changes that lower the peak, the cheapest first; empty if the run fits or `device_memory` is None."""
    warnings: list[str]
    """Settings that are probably not intended, each with a better one."""

    @property
    def peak(self) -> int:
        """The highest peak of any simulated rank, in bytes."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """True if the peak is at most `device_memory`; None if that is None."""
        return None if self.device_memory is None else self.peak <= self.device_memory

    def __str__(self) -> str:
        return text_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data: all fields, and `peak` and `fits`."""
        return {**asdict(self), "peak": self.peak, "fits": self.fits}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Return the plan of a `to_dict()`."""
        fields = {name: value for name, value in data.items() if name not in ("peak", "fits")}
        fields["mesh"] = [Axis(**axis) for axis in data["mesh"]]
        fields["flops"] = Flops(**data["flops"])
        fields["suggestions"] = [Suggestion(**suggestion) for suggestion in data["suggestions"]]
        fields["stages"] = [
            Stage(**{**stage, "collectives": [Collective(**entry) for entry in stage["collectives"]]})
            for stage in data["stages"]
        ]
        return cls(**fields)

    def to_json(self) -> str:
        """Return `to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan of a `to_json()`."""
        return cls.from_dict(json.loads(text))


FEW_STAGES = 3
COLUMNS = ("parameters", "gradients", "optimizer", "activations", "peak")
"""Fields of `Stage` in the table of stages, of a plan with many stages."""


def text_of(plan: Plan) -> str:
    """Return the report: mesh, step, memory, collectives, whether it fits, warnings.

    For more than `FEW_STAGES` stages it has a table of all, and details of the stage with the highest peak.
    """
    return "\n".join([*_head(plan), *_stages(plan), *_verdict(plan)])


def _head(plan: Plan) -> Iterator[str]:
    nodes = -(-plan.world_size // plan.ranks_per_node)
    yield (
        f"Dry run of {plan.model}: {show_count(plan.num_parameters)} parameters on {_many(plan.world_size, 'rank')}, "
        f"{_many(nodes, 'node')} of {_many(plan.ranks_per_node, 'rank')}"
    )
    yield ""
    yield "Mesh"
    for axis in plan.mesh:
        where = "within a node" if axis.nodes == 1 else f"across {axis.nodes} nodes"
        yield f"  {axis.name:<13}{axis.size:>5}   ranks {_ranks(axis.ranks)}, {where}"
    if not plan.mesh:
        yield "  one rank"
    yield ""
    yield "Step"
    yield (
        f"  {_many(plan.num_batches, 'micro-batch', 'micro-batches')} of {_many(plan.local_batch_size, 'sequence')} "
        f"per data rank, {plan.tokens_per_step:,} tokens in total"
    )
    flops = plan.flops
    for name, full, causal in (
        ("token", flops.full_per_token, flops.causal_per_token),
        ("step", flops.full_per_step, flops.causal_per_step),
    ):
        yield f"  FLOPs per {name:<6} {show_count(full)} (full), {show_count(causal)} (causal)"
    if plan.bubble is not None:
        yield f"  pipeline bubble  {plan.bubble:.1%} of a step"


def _stages(plan: Plan) -> Iterator[str]:
    detailed = plan.stages
    if len(detailed) > FEW_STAGES:
        yield ""
        yield f"Memory per rank {''.join(f'{name:>12}' for name in COLUMNS)}"
        for stage in detailed:
            sizes = (getattr(stage, name) for name in COLUMNS)
            yield f"  stage {stage.stage:<8}{''.join(f'{show_bytes(size):>12}' for size in sizes)}"
        detailed = [max(detailed, key=lambda stage: stage.peak)]
    for stage in detailed:
        name = f", stage {stage.stage} ({_many(stage.num_ranks, 'rank')})" if len(plan.stages) > 1 else ""
        yield ""
        yield f"Memory per rank{name}"
        yield from _memory(stage)
        yield ""
        yield f"Collectives per rank and step{name}"
        for entry in stage.collectives:
            yield f"  {entry.axis:<22}{entry.kind:<15}{entry.calls:>8,}   {show_bytes(entry.bytes):>11}"
        if not stage.collectives:
            yield "  none"


def _memory(stage: Stage) -> Iterator[str]:
    yield (
        f"  parameters {show_bytes(stage.parameters)}, gradients {show_bytes(stage.gradients)}, "
        f"optimizer {show_bytes(stage.optimizer)}, activations {show_bytes(stage.activations)}"
    )
    yield f"  peak {show_bytes(stage.peak)}, during {stage.peak_in}:"
    for name, size in sorted(stage.at_peak.items(), key=lambda item: -item[1]):
        if size:
            yield f"    {name.replace('_', ' '):<19}{show_bytes(size):>11}   {size / stage.peak:>4.0%}"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.compiled:
        yield ""
        yield "Blocks are compiled: fused kernels save fewer activations than the eager ones that are counted here."
    if plan.device_memory is not None:
        left = plan.device_memory - plan.peak
        worst = max(plan.stages, key=lambda stage: stage.peak)
        largest = max(worst.at_peak, key=lambda name: worst.at_peak[name]).replace("_", " ")
        yield ""
        if plan.fits:
            yield f"Fits {show_bytes(plan.device_memory)}: {show_bytes(left)} free."
        else:
            yield (
                f"Does not fit {show_bytes(plan.device_memory)}: {show_bytes(-left)} over. The largest share of the "
                f"peak: {largest}."
            )
        for suggestion in plan.suggestions:
            verdict = "fits" if suggestion.fits else "does not fit"
            yield f"  {show_bytes(suggestion.peak):>11} ({verdict}) with {suggestion.change}"
    if plan.warnings:
        yield ""
        yield "Warnings"
        for line in plan.warnings:
            yield f"  {line}"


def _many(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]}, {ranks[1]}, {ranks[2]}, ... {ranks[-1]}"
