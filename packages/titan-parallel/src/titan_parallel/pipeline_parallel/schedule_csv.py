"""Pipeline schedules from a file in the CSV format of `torch.distributed.pipelining`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from titan_config import ConfigError

from titan_parallel._torch.pipelining import Action, parse_action, validate_actions


@dataclass(frozen=True)
class Actions:
    """The actions of each rank, in order: a row per rank, a cell such as `0F1` (stage, action, micro-batch) each."""

    rows: tuple[list[Action | None], ...]
    ranks: tuple[int, ...]
    """stage -> rank"""
    num_micro_batches: int
    splits_backward: bool


def read_actions(path: Path, num_ranks: int) -> Actions:
    """Read a schedule file. Raises ConfigError if it is unreadable or not a valid schedule for `num_ranks` ranks."""
    try:
        with path.open(newline="") as file:
            rows = [[parse_action(cell) for cell in row] for row in csv.reader(file)]
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "pipeline_parallel_schedule_csv must be a readable CSV file with a row per rank and cells such as 0F0, "
            f"0B0, 0I0, 0W0, got {path}: {error}."
        ) from error
    single = [part for row in rows for action in row if action is not None for part in action.sub_actions or (action,)]
    try:
        ranks = _ranks(rows, single, num_ranks)
    except AssertionError as error:
        raise ConfigError(
            "pipeline_parallel_schedule_csv must have a row for each rank of the pipeline, in which each stage of the "
            "rank runs each micro-batch forward (F) and then backward (B, or I and W), got "
            f"{path}: {str(error).splitlines()[0]}. Correct the file or pipeline_parallel_degree."
        ) from error
    num_micro_batches = len({action.microbatch_index for action in single})
    splits = any(action.computation_type.value in ("I", "W") for action in single)
    return Actions(tuple(rows), ranks, num_micro_batches, splits)


def _ranks(rows: list[list[Action | None]], single: list[Action], num_ranks: int) -> tuple[int, ...]:
    """Return the rank of each stage. Raises AssertionError, as torch does, for an invalid schedule."""
    assert len(rows) == num_ranks, f"{len(rows)} rows for {num_ranks} ranks"
    for rank, row in enumerate(rows):
        assert any(row), f"rank {rank} has no stage"
    for action in single:
        assert action.is_compute_op, f"{action} is not a compute action; remove all other actions"
    stages = {action.stage_index for action in single}
    numbers = {_number(action) for action in single}
    for what, found in (("stages", stages), ("micro-batches", numbers)):
        assert found == set(range(len(found))), f"{what} must be numbered 0, 1, 2, ..., got {sorted(found)}"
    for stage in stages:
        forwards = [_number(a) for a in single if a.stage_index == stage and a.computation_type.value == "F"]
        assert forwards == sorted(forwards), f"stage {stage} must run forwards in ascending order, got {forwards}"
    ranks = validate_actions(dict(enumerate(rows)), num_ranks, len(stages), len(numbers))
    return tuple(ranks[stage] for stage in sorted(ranks))


def _number(action: Action) -> int:
    assert action.microbatch_index is not None, f"{action} has no micro-batch number"
    return action.microbatch_index
