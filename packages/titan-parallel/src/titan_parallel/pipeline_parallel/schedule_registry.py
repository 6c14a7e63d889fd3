"""The pipeline schedules of torch, with their constraints on stages and micro-batches."""

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
    """The default placement of stages on ranks, and the kind of backward, of a schedule.

    `any_number`: the schedule accepts any number of stages per rank. `layout` is `"loop"` or `"v"`. `splits_backward`:
    gradients of inputs and of weights are computed in separate backward passes.
    """

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
    """The schedule of a run: the rank of each stage, and a factory for the torch schedule."""

    name: str
    ranks: tuple[int, ...]
    """stage -> rank along the pipeline axis"""
    splits_backward: bool
    actions: Actions | None = None
    """The actions read from a schedule file. None: torch generates them."""

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    def check_micro_batches(self, number: int) -> None:
        """Raise ValueError, on every rank, if the schedule cannot run `number` micro-batches."""
        num_ranks = max(self.ranks) + 1
        rounds = max(1, number // num_ranks)
        if self.actions is not None:
            fits, need = number == self.actions.num_micro_batches, str(self.actions.num_micro_batches)
        elif self.name in ("1F1B", "DualPipeV"):
            fits, need = number >= self.num_stages, f"at least {self.num_stages} (the number of stages)"
        elif self.name in ("Interleaved1F1B", "InterleavedZeroBubble"):
            fits, need = number % rounds == 0, f"a multiple of {rounds} (micro-batches // pipeline ranks)"
        else:
            return
        if not fits:
            raise ValueError(
                f"The number of micro-batches per step must be {need} for the pipeline schedule {self.name}, got "
                f"{number}. Change the number (global batch / (micro-batch x data ranks)) or the schedule."
            )

    def build(self, stages: Sequence[PipelineStage], number: int, loss: Callable[..., Tensor]) -> Any:
        """Return the torch schedule for the stages of this rank and `number` micro-batches."""
        if self.actions is not None:
            return schedule_of_actions(self.actions.rows, stages, number, loss)
        schedule: Any = get_schedule_class(self.name)
        one_stage = issubclass(schedule, PipelineScheduleSingle)
        return schedule(stages[0] if one_stage else list(stages), number, loss_fn=loss, scale_grads=False)


def schedule_of(dims: ParallelDims) -> PipelineSchedule:
    """Return the schedule that the config of `dims` selects. Raises ConfigError, on every rank, for an invalid one."""
    config = dims.config
    if config.pipeline_parallel_schedule_csv is not None:
        return _from_file(config.pipeline_parallel_schedule_csv, dims)
    name = config.pipeline_parallel_schedule
    traits, number = TRAITS[name], config.pipeline_parallel_stages_per_rank
    if number is not None and number != traits.stages_per_rank and not traits.any_number:
        raise ConfigError(
            f"pipeline_parallel_stages_per_rank must be {traits.stages_per_rank} or None for the schedule {name}, got "
            f"{number}. Choose Interleaved1F1B for another number."
        )
    num_stages = dims.pp_size * (number or traits.stages_per_rank)
    ranks = stage_ranks(dims.pp_size, num_stages, traits.layout)
    return PipelineSchedule(name, ranks, traits.splits_backward)


def _from_file(path: Path, dims: ParallelDims) -> PipelineSchedule:
    actions, per_rank = read_actions(path, dims.pp_size), dims.config.pipeline_parallel_stages_per_rank
    if per_rank is not None and any(actions.ranks.count(rank) != per_rank for rank in range(dims.pp_size)):
        raise ConfigError(
            f"pipeline_parallel_stages_per_rank must agree with {path}, which places {len(actions.ranks)} stages on "
            f"{dims.pp_size} ranks, got {per_rank}. Set pipeline_parallel_stages_per_rank to None to use the file."
        )
    return PipelineSchedule(path.name, actions.ranks, actions.splits_backward, actions)
