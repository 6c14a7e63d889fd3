"""Simulate a few blocks and micro-batches of a step, and extrapolate to all of them, exactly.

Every sum over a step grows by the same amount with each further equivalent block, and with each further micro-batch
after the first and before the last. So does the peak at each allocation site. Pipeline stages of equivalent blocks,
between the first and the last, differ by their number of in-flight micro-batches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.planning.child import run_in_children
from titan_parallel.planning.record import PipelineRank, StepRecord, extrapolate
from titan_parallel.planning.simulate import SimulatedStep, simulate
from titan_parallel.sharding_plan.roles import Roles

FEW_BLOCKS = 4
FEW_BATCHES = 2


class Extrapolator:
    """Simulates steps of one model with as few blocks, micro-batches and ranks as are needed."""

    def __init__(self, step: SimulatedStep, every_block: bool = False) -> None:
        """`every_block`: simulate all blocks and all pipeline ranks."""
        model, roles = step.built()
        self.model_name, self.num_parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
        self._blocks = Roles(model, roles).named("block")
        self._kinds = [*range(len(self._blocks))] if every_block else _kinds(model, self._blocks)
        self._repeating = _longest_repeating_range(self._kinds)

    def records(self, step: SimulatedStep, ranks: Sequence[int]) -> list[StepRecord]:
        """Return the records of `ranks`, which are the first rank of each stage, or a single one."""
        last = len(ranks) - 1
        known = self._simulated(step, ranks, {0, last})
        groups: dict[Hashable, list[int]] = {}
        for index in range(1, last):
            groups.setdefault(self._kinds_of(known[0].pipeline[index]), []).append(index)
        known |= self._simulated(
            step, ranks, {group[at] for group in groups.values() for at in (0, len(group) // 2, -1)}
        )
        for group in groups.values():
            known = self._interpolated(known, group) | known
        known |= self._simulated(step, ranks, {*range(len(ranks))} - known.keys())
        return [known[index] for index in range(len(ranks))]

    def _simulated(self, step: SimulatedStep, ranks: Sequence[int], indices: Collection[int]) -> dict[int, StepRecord]:
        records = run_in_children([functools.partial(self.record, step, ranks[index]) for index in sorted(indices)])
        return dict(zip(sorted(indices), records, strict=True))

    def _interpolated(self, known: Mapping[int, StepRecord], group: Sequence[int]) -> dict[int, StepRecord]:
        """Return records interpolated between the first and last of a group; {} if the middle one disagrees."""
        first, middle, last = (known[group[at]] for at in (0, len(group) // 2, -1))
        in_flight = [first.pipeline[index].in_flight for index in group]
        span = in_flight[-1] - in_flight[0]
        records: dict[int, StepRecord] = {}
        for index, mine in zip(group, in_flight, strict=True):
            if span or mine == in_flight[0]:
                record = first.interpolated(last, mine - in_flight[0], span or 1)
                if record is not None:
                    records[index] = record
        between = records.get(group[len(group) // 2])
        return records if between is not None and between.agrees_with(middle) else {}

    def _kinds_of(self, rank: PipelineRank) -> Hashable:
        """Return a key that is equal for equivalent ranks.

        Ranks of several stages are never equivalent: their in-flight micro-batches belong to different stages.
        """
        if len(rank.blocks) > 1:
            return (*rank.blocks,)
        return tuple(self._kinds[block] for block in rank.blocks[0])

    def record(self, step: SimulatedStep, rank: int) -> StepRecord:
        """Return memory, FLOPs and communication of `rank` in `step`."""
        few, period = _few_batches(step.parallelism)
        if step.num_batches <= few + period or step.num_batches % period:
            return self._over_blocks(step, rank)

        def simulated(number: int) -> StepRecord:
            return self._over_blocks(step.changed(num_batches=number, num_scheduled_batches=step.num_batches), rank)

        return extrapolate(simulated, few, period, step.num_batches) or self._over_blocks(step, rank)

    def _over_blocks(self, step: SimulatedStep, rank: int) -> StepRecord:
        repeating, checkpoint_period = self._repeating, _checkpoint_period(step.activation_checkpoint)
        if repeating is None or checkpoint_period is None or step.parallelism.pipeline_parallel_degree > 1:
            return simulate(step, rank)
        period, number = math.lcm(repeating.period, checkpoint_period), repeating.stop - repeating.start
        few = max(FEW_BLOCKS, 2 * period)
        few += (number - few) % period
        if few + 2 * period >= number:
            return simulate(step, rank)

        def simulated(num_kept: int) -> StepRecord:
            removed = self._blocks[repeating.start + num_kept : repeating.stop]
            return simulate(step.changed(removed_blocks=tuple(removed)), rank)

        return extrapolate(simulated, few, period, number) or simulate(step, rank)


@dataclass(frozen=True)
class RepeatingRange:
    """Blocks of a stack, `start` to `stop`, whose kinds repeat after `period` blocks."""

    start: int
    stop: int
    period: int


def _longest_repeating_range(kinds: Sequence[int]) -> RepeatingRange | None:
    """Return the range in which most blocks repeat earlier ones; None if no block does."""
    best = None
    for period in range(1, len(kinds) // 2):
        repeats = [kinds[i] == kinds[i + period] for i in range(len(kinds) - period)]
        start = 0
        for is_repeated, run in itertools.groupby(repeats):
            length = len([*run])
            if is_repeated and (best is None or length > best.stop - best.start - best.period):
                best = RepeatingRange(start, start + length + period, period)
            start += length
    return best


def _few_batches(parallelism: ParallelDims.Config) -> tuple[int, int]:
    """Return the number of micro-batches that fill a pipeline, and the number after which its schedule repeats."""
    num_ranks = parallelism.pipeline_parallel_degree
    if num_ranks == 1:
        return FEW_BATCHES, 1
    from titan_parallel.pipeline_parallel.schedule_registry import TRAITS

    schedule = TRAITS.get(parallelism.pipeline_parallel_schedule)
    one_stage_each = schedule is not None and schedule.stages_per_rank == 1
    return (num_ranks + 1, 1) if one_stage_each else (FEW_BATCHES * num_ranks, num_ranks)


def _checkpoint_period(config: ActivationCheckpoint.Config | None) -> int | None:
    """Return the number of blocks after which activation checkpointing repeats; None if it does not."""
    return 1 if config is None else config.build().period


def _kinds(model: nn.Module, blocks: list[str]) -> list[int]:
    """Return a number for each block, equal for equivalent blocks; all differ unless the blocks are one list."""
    parents = {name.rpartition(".")[0] for name in blocks}
    if len(parents) != 1 or not isinstance(model.get_submodule(parents.pop()), nn.ModuleList | nn.Sequential):
        return [*range(len(blocks))]
    seen: list[tuple[int, dict[Hashable, Any]]] = []
    kinds = []
    for number, name in enumerate(blocks):
        description = _description(model.get_submodule(name))
        same = (index for index, (first, other) in enumerate(seen) if _is_equivalent(other, first, description, number))
        index = next(same, len(seen))
        if index == len(seen):
            seen.append((number, description))
        kinds.append(index)
    return kinds


def _description(block: nn.Module) -> dict[Hashable, Any]:
    """Return the types, shapes and settings of the modules of a block."""
    description: dict[Hashable, Any] = {}
    for name, module in block.named_modules():
        description[name] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str) or is_dataclass(value):
                description |= _settings((name, key), value)
    parameters = block.named_parameters()
    description |= {(name, "parameter"): (tuple(p.shape), p.dtype, p.requires_grad) for name, p in parameters}
    return description


def _settings(path: tuple[Hashable, ...], value: Any) -> Iterator[tuple[Hashable, Any]]:
    """Yield (path, value) for each plain value in `value`, without weight initializers: they do not change a step."""
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype):
        yield path, value
    elif is_dataclass(value):
        yield path, type(value)
        for field in fields(value):
            if "init" not in field.name.split("_"):
                yield from _settings((*path, field.name), getattr(value, field.name, None))
    elif isinstance(value, list | tuple | dict):
        yield path, len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _settings((*path, key), item)


def _is_equivalent(one: dict[Hashable, Any], number: int, other: dict[Hashable, Any], other_number: int) -> bool:
    """Return whether two blocks are equal, except for values that are their own layer index."""
    return one.keys() == other.keys() and all(
        value == other[key] or (value, other[key]) == (number, other_number) for key, value in one.items()
    )
