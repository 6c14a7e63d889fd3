"""A plan: what a run would be, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from titan_parallel.planning.sizes import show_bytes, show_count


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: which ranks the first rank shares it with, and over how many nodes they lie."""

    name: str
    size: int
    ranks: list[int]
    nodes: int


@dataclass(frozen=True)
class Flops:
    """Of matrix products and attention, forward and backward, over all ranks; what is recomputed is not counted.

    `full` counts every query with every key, `causal` the half that a causal mask leaves.
    """

    full_per_token: int
    causal_per_token: int
    full_per_step: int
    causal_per_step: int


@dataclass(frozen=True)
class Collective:
    """What a rank sends and receives in a step, of one kind along one axis; bytes are of the larger side of each."""

    axis: str
    kind: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline (the whole model, where there is none), in bytes of a rank of it.

    `at_peak` is what memory is for when there is most of it; it adds up to `peak`. `activations` is the most that
    forwards keep for backwards at once.
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
class Remedy:
    """A change of the run, and the peak it would have."""

    change: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run would be. `str(plan)` is for people, `plan.to_json()` for programs."""

    model: str
    num_parameters: int
    world_size: int
    ranks_per_node: int
    mesh: list[Axis]
    rows: int
    """Of a micro-batch."""
    num_batches: int
    """Micro-batches of a data rank in a step."""
    tokens_per_step: int
    """Of all data ranks."""
    flops: Flops
    stages: list[Stage]
    bubble: float | None
    """The share of a step in which a rank waits for other stages; None without a pipeline."""
    compiled: bool
    """Whether blocks are compiled. They are planned as eager ones, which keep no less."""
    device_memory: int | None
    remedies: list[Remedy]
    """Cheapest first; none where the run fits, or nobody asked."""
    wasteful: list[str]

    @property
    def peak(self) -> int:
        """The most bytes that any rank holds at once."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether every rank's peak is within `device_memory`; None where none was given."""
        return None if self.device_memory is None else self.peak <= self.device_memory

    def __str__(self) -> str:
        return text_of(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON data: all fields, and `peak` and `fits`."""
        return {**asdict(self), "peak": self.peak, "fits": self.fits}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan whose `to_dict()` this is."""
        fields = {name: value for name, value in data.items() if name not in ("peak", "fits")}
        fields["mesh"] = [Axis(**axis) for axis in data["mesh"]]
        fields["flops"] = Flops(**data["flops"])
        fields["remedies"] = [Remedy(**remedy) for remedy in data["remedies"]]
        fields["stages"] = [
            Stage(**{**stage, "collectives": [Collective(**entry) for entry in stage["collectives"]]})
            for stage in data["stages"]
        ]
        return cls(**fields)

    def to_json(self) -> str:
        """`to_dict()` as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan whose `to_json()` this is."""
        return cls.from_dict(json.loads(text))


FEW_STAGES = 3
COLUMNS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "kept": "activations",
    "peak": "peak",
}
"""What is told of each of many stages -> what a stage has of it."""


def text_of(plan: Plan) -> str:
    """One screen: mesh, step, memory, collectives, and what to make of it. Of many stages the fullest is told whole."""
    return "\n".join([*_head(plan), *_stages(plan), *_verdict(plan)])


def _head(plan: Plan) -> Iterator[str]:
    nodes = -(-plan.world_size // plan.ranks_per_node)
    yield (
        f"{plan.model}: {show_count(plan.num_parameters)}parameters on {_many(plan.world_size, 'rank')}, "
        f"{_many(nodes, 'node')} of {plan.ranks_per_node}"
    )
    yield ""
    yield "Mesh"
    for axis in plan.mesh:
        where = "within a node" if axis.nodes == 1 else f"over {axis.nodes} nodes"
        yield f"  {axis.name:<13}{axis.size:>5}   ranks {_ranks(axis.ranks)}, {where}"
    if not plan.mesh:
        yield "  one rank"
    yield ""
    yield "SimulatedStep"
    yield (
        f"  {_many(plan.num_batches, 'micro-batch', 'micro-batches')} of {_many(plan.rows, 'row')} on a data rank, "
        f"{plan.tokens_per_step:,} tokens in all"
    )
    flops = plan.flops
    for name, full, causal in (
        ("token", flops.full_per_token, flops.causal_per_token),
        ("step", flops.full_per_step, flops.causal_per_step),
    ):
        yield f"  FLOPs per {name:<6} {show_count(full)}(full), {show_count(causal)}(causal)"
    if plan.bubble is not None:
        yield f"  pipeline bubble  {plan.bubble:.1%} of a step"


def _stages(plan: Plan) -> Iterator[str]:
    told = plan.stages
    if len(told) > FEW_STAGES:
        yield ""
        yield f"Memory of a rank{''.join(f'{name:>12}' for name in COLUMNS)}"
        for stage in told:
            sizes = (getattr(stage, attribute) for attribute in COLUMNS.values())
            yield f"  stage {stage.stage:<8}{''.join(f'{show_bytes(size):>12}' for size in sizes)}"
        told = [max(told, key=lambda stage: stage.peak)]
    for stage in told:
        name = f", stage {stage.stage} ({_many(stage.num_ranks, 'rank')})" if len(plan.stages) > 1 else ""
        yield ""
        yield f"Memory of a rank{name}"
        yield from _memory(stage)
        yield ""
        yield f"Collectives of a rank and step{name}"
        for entry in stage.collectives:
            yield f"  {entry.axis:<22}{entry.kind:<15}{entry.calls:>8,}   {show_bytes(entry.bytes):>11}"
        if not stage.collectives:
            yield "  none"


def _memory(stage: Stage) -> Iterator[str]:
    yield (
        f"  parameters {show_bytes(stage.parameters)}, gradients {show_bytes(stage.gradients)}, "
        f"optimizer {show_bytes(stage.optimizer)}, kept for the backward {show_bytes(stage.activations)}"
    )
    yield f"  peak {show_bytes(stage.peak)}, in the {stage.peak_in}:"
    for name, size in sorted(stage.at_peak.items(), key=lambda item: -item[1]):
        if size:
            yield f"    {name.replace('_', ' '):<19}{show_bytes(size):>11}   {size / stage.peak:>4.0%}"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.compiled:
        yield ""
        yield "Blocks are compiled: fused kernels keep less than the eager ones that are counted here."
    if plan.device_memory is not None:
        left = plan.device_memory - plan.peak
        worst = max(plan.stages, key=lambda stage: stage.peak)
        largest = max(worst.at_peak, key=lambda name: worst.at_peak[name]).replace("_", " ")
        yield ""
        if plan.fits:
            yield f"Fits {show_bytes(plan.device_memory)}: {show_bytes(left)} are left."
        else:
            yield (
                f"Does not fit {show_bytes(plan.device_memory)}: {show_bytes(-left)} too much, and most of it "
                f"are {largest}."
            )
        for remedy in plan.remedies:
            verdict = "fits" if remedy.fits else "does not fit"
            yield f"  {show_bytes(remedy.peak):>11} ({verdict}) with {remedy.change}"
    if plan.wasteful:
        yield ""
        yield "Looks wasteful"
        for line in plan.wasteful:
            yield f"  {line}"


def _many(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]}, {ranks[1]}, {ranks[2]}, ... {ranks[-1]}"
