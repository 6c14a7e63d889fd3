"""The schedules of pipelines: what each asks of stages and micro-batches. They themselves are torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_config import ConfigError
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from titan_parallel._torch.pipelining import schedule_of_actions, stage_ranks
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.pipeline_parallel.schedule_csv import Actions, read_actions


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
    actions: Actions | None = None
    """Where a file says them. None: torch makes them."""

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    def check_micro_batches(self, number: int) -> None:
        """Raise ValueError, alike on every rank, where the schedule cannot run as many."""
        num_ranks = max(self.ranks) + 1
        rounds = max(1, number // num_ranks)
        if self.actions is not None:
            fits, need = number == self.actions.num_micro_batches, f"runs {self.actions.num_micro_batches} of them"
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
        if self.actions is not None:
            return schedule_of_actions(self.actions.rows, stages, number, loss)
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
    num_stages = dims.pp_size * (number or traits.stages_per_rank)
    ranks = stage_ranks(dims.pp_size, num_stages, traits.layout)
    return PipelineSchedule(name, ranks, traits.splits_backward)


def _from_file(path: Path, dims: ParallelDims) -> PipelineSchedule:
    actions, per_rank = read_actions(path, dims.pp_size), dims.config.pipeline_parallel_stages_per_rank
    if per_rank is not None and any(actions.ranks.count(rank) != per_rank for rank in range(dims.pp_size)):
        raise ConfigError(
            f"Got pipeline_parallel_stages_per_rank {per_rank} and {path} with {len(actions.ranks)} stages on "
            f"{dims.pp_size} ranks. The file says which rank holds which stage. Set it to None."
        )
    return PipelineSchedule(path.name, actions.ranks, actions.splits_backward, actions)
