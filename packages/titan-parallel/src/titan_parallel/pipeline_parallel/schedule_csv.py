"""A schedule of a pipeline from a file in torch's CSV format."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from titan_config import ConfigError

from titan_parallel._torch.pipelining import Action, parse_action, validate_actions


@dataclass(frozen=True)
class Actions:
    """What each rank does, in order: a row per rank, a cell per step such as `0F1` (stage, what, micro-batch)."""

    rows: tuple[list[Action | None], ...]
    ranks: tuple[int, ...]
    """stage -> rank"""
    num_micro_batches: int
    splits_backward: bool


def read_actions(path: Path, num_ranks: int) -> Actions:
    """Read a file. Raises ConfigError for one that is no schedule of so many ranks."""
    try:
        with path.open(newline="") as file:
            rows = [[parse_action(cell) for cell in row] for row in csv.reader(file)]
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Got {path} as pipeline_parallel_schedule_csv, which cannot be read: {error}. It is a row per rank with "
            "cells such as 0F0, 0B0, 0I0, 0W0. Correct the file or the path."
        ) from error
    single = [part for row in rows for action in row if action is not None for part in action.sub_actions or (action,)]
    try:
        ranks = _ranks(rows, single, num_ranks)
    except AssertionError as error:
        raise ConfigError(
            f"Got {path} as pipeline_parallel_schedule_csv: {str(error).splitlines()[0]}. A schedule has a row for "
            "each rank of the pipeline, in which each of its stages runs each micro-batch forward (F) and then "
            "backward (B, or I and W). Correct the file or pipeline_parallel_degree."
        ) from error
    num_micro_batches = len({action.microbatch_index for action in single})
    splits = any(action.computation_type.value in ("I", "W") for action in single)
    return Actions(tuple(rows), ranks, num_micro_batches, splits)


def _ranks(rows: list[list[Action | None]], single: list[Action], num_ranks: int) -> tuple[int, ...]:
    """The rank of each stage. Raises AssertionError, as torch does, for what is no schedule."""
    assert len(rows) == num_ranks, f"{len(rows)} rows for {num_ranks} ranks"
    for rank, row in enumerate(rows):
        assert any(row), f"rank {rank} has no stage"
    for action in single:
        assert action.is_compute_op, f"{action} is no computation; what is sent and received follows from those"
    stages = {action.stage_index for action in single}
    numbers = {_number(action) for action in single}
    for what, found in (("stages", stages), ("micro-batches", numbers)):
        assert found == set(range(len(found))), f"{what} are {sorted(found)}, not 0, 1, 2, ..."
    for stage in stages:
        forwards = [_number(a) for a in single if a.stage_index == stage and a.computation_type.value == "F"]
        assert forwards == sorted(forwards), f"stage {stage} runs micro-batches in the order {forwards}"
    ranks = validate_actions(dict(enumerate(rows)), num_ranks, len(stages), len(numbers))
    return tuple(ranks[stage] for stage in sorted(ranks))


def _number(action: Action) -> int:
    assert action.microbatch_index is not None, f"{action} names no micro-batch"
    return action.microbatch_index
