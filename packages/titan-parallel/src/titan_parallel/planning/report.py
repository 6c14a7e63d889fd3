"""A plan: what a run would be, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


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
        from titan_parallel.planning.text import text_of

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
