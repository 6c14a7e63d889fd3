"""The schedules of pipelines: what each asks of stages and micro-batches. They themselves are torch's."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_config import ConfigError
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from titan_parallel._pipelining import Action, parse_action, schedule_of_actions, stage_ranks, validate_actions
from titan_parallel.dims import ParallelDims


@dataclass(frozen=True)
class Traits:
    """How a schedule lays stages over ranks, and whether it splits the backward into inputs and weights."""

    stages_per_rank: int = 2
    any_number: bool = True
    layout: str = "loop"
    splits_backward: bool = False


TRAITS = {
    "GPipe": Traits(stages_per_rank=1, any_number=False),
    "1F1B": Traits(stages_per_rank=1, any_number=False),
    "Interleaved1F1B": Traits(),
    "LoopedBFS": Traits(),
    "InterleavedZeroBubble": Traits(splits_backward=True),
    "ZBVZeroBubble": Traits(any_number=False, layout="v", splits_backward=True),
    "DualPipeV": Traits(any_number=False, layout="v", splits_backward=True),
}


@dataclass(frozen=True)
class PipelineSchedule:
    """The schedule of a run: the rank of each stage, and a maker of torch's object for it."""

    name: str
    ranks: tuple[int, ...]
    """stage -> rank along the pipeline axis"""
    splits_backward: bool
    actions: tuple[list[Action | None], ...] = ()
    """Of each rank, where a file says them; none where torch makes them."""
    num_micro_batches: int | None = None
    """What a file says; None: any that the schedule can take."""

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    def check_micro_batches(self, number: int) -> None:
        """Raise ValueError, alike on every rank, where the schedule cannot run as many."""
        num_ranks = max(self.ranks) + 1
        rounds = max(1, number // num_ranks)
        if self.num_micro_batches is not None:
            fits, need = number == self.num_micro_batches, f"runs {self.num_micro_batches}, no more and no less"
        elif self.name in ("1F1B", "DualPipeV"):
            fits, need = number >= self.num_stages, f"needs at least as many as its {self.num_stages} stages"
        elif self.name in ("Interleaved1F1B", "InterleavedZeroBubble"):
            fits, need = number % rounds == 0, f"runs them in {rounds} equal rounds of {num_ranks} or more"
        else:
            return
        if not fits:
            raise ValueError(
                f"Got {number} micro-batches for the pipeline schedule {self.name}. It {need}. Change the number of "
                "micro-batches of a step (global batch / (micro-batch x data ranks)), or the schedule."
            )

    def build(self, stages: Sequence[PipelineStage], number: int, loss: Callable[..., Tensor]) -> Any:
        """Torch's schedule over this rank's stages, for `number` micro-batches."""
        if self.actions:
            return schedule_of_actions(self.actions, stages, number, loss)
        schedule: Any = get_schedule_class(self.name)
        one_stage = issubclass(schedule, PipelineScheduleSingle)
        return schedule(stages[0] if one_stage else list(stages), number, loss_fn=loss, scale_grads=False)


def schedule_of(dims: ParallelDims) -> PipelineSchedule:
    """The schedule that a config names. Raises ConfigError, alike on every rank, where it cannot be."""
    config = dims.config
    if config.pipeline_parallel_schedule_csv is not None:
        return _from_file(config.pipeline_parallel_schedule_csv, dims)
    name = config.pipeline_parallel_schedule
    traits, number = TRAITS[name], config.pipeline_parallel_stages_per_rank
    if number is not None and number != traits.stages_per_rank and not traits.any_number:
        raise ConfigError(
            f"Got pipeline_parallel_stages_per_rank {number} for the schedule {name}. It puts "
            f"{traits.stages_per_rank} on each rank. Set it to {traits.stages_per_rank} or None, or take another "
            "schedule."
        )
    num_stages = dims.num_pipeline * (number or traits.stages_per_rank)
    ranks = stage_ranks(dims.num_pipeline, num_stages, traits.layout)
    return PipelineSchedule(name, ranks, traits.splits_backward)


def _from_file(path: Path, dims: ParallelDims) -> PipelineSchedule:
    """A schedule in torch's CSV format: a row per rank, a cell per step, such as `0F1` (stage, what, micro-batch)."""
    try:
        with path.open(newline="") as file:
            rows = [[parse_action(cell) for cell in row] for row in csv.reader(file)]
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Got {path} as pipeline_parallel_schedule_csv, which cannot be read: {error}. It is a row per rank with "
            "cells such as 0F0, 0B0, 0I0, 0W0. Correct the file or the path."
        ) from error
    actions = [action for row in rows for action in row if action is not None]
    single = [part for action in actions for part in action.sub_actions or (action,)]
    stages, micro_batches = ({getattr(a, what) for a in single} for what in ("stage_index", "microbatch_index"))
    per_rank = dims.config.pipeline_parallel_stages_per_rank
    ranks = _checked(path, rows, stages, micro_batches, dims.num_pipeline)
    if per_rank is not None and any(ranks.count(rank) != per_rank for rank in range(dims.num_pipeline)):
        raise ConfigError(
            f"Got pipeline_parallel_stages_per_rank {per_rank} and {path} with {len(ranks)} stages on "
            f"{dims.num_pipeline} ranks. The file says which rank holds which stage. Set it to None."
        )
    splits = any(action.computation_type.value in ("I", "W") for action in single)
    return PipelineSchedule(path.name, ranks, splits, tuple(rows), len(micro_batches))


def _checked(
    path: Path, rows: list[list[Action | None]], stages: set[int], micro_batches: set[int], num_ranks: int
) -> tuple[int, ...]:
    """The rank of each stage, where torch finds that every stage runs every micro-batch forward and then backward."""
    problem: str | None = None
    ranks: Mapping[int, int] = {}
    if len(rows) != num_ranks:
        problem = f"{len(rows)} rows for pipeline_parallel_degree {num_ranks}"
    elif stages != set(range(len(stages))) or micro_batches != set(range(len(micro_batches))):
        problem = f"stages {sorted(stages)} and micro-batches {sorted(micro_batches)}, which are not 0, 1, 2, ..."
    else:
        try:
            ranks = validate_actions(dict(enumerate(rows)), num_ranks, len(stages), len(micro_batches))
            if idle := set(range(num_ranks)) - set(ranks.values()):
                problem = f"no stage on rank {min(idle)}"
        except AssertionError as error:
            problem = str(error).splitlines()[0]
    if problem is not None:
        raise ConfigError(
            f"Got {problem} in {path}. A schedule has a row for each rank, in which each of its stages runs each "
            "micro-batch forward (F) and then backward (B, or I and W). Correct the file or pipeline_parallel_degree."
        )
    return tuple(ranks[stage] for stage in sorted(ranks))
