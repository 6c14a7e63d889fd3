"""Blocks and micro-batches that are alike need not all be simulated: what a few cost tells what many do, exactly.

Everything a step sums grows by the same amount with each further block, and with each further micro-batch after the
first and before the last. So does what is alive at any one place of the step, at its fullest. And where stages between
the first and the last are alike, they differ by how many micro-batches are under way.
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
from titan_parallel.planning.child import in_children
from titan_parallel.planning.record import PipelineRank, StepRecord, extrapolated
from titan_parallel.planning.simulate import SimulatedStep, simulate
from titan_parallel.sharding_plan.roles import Roles

FEW_BLOCKS = 4
FEW_BATCHES = 2


class Alike:
    """Simulates steps of one model as far as it must be."""

    def __init__(self, step: SimulatedStep, every_block: bool = False) -> None:
        """`every_block`: leave none out."""
        model, roles = step.built()
        self.name, self.num_parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
        self._blocks = Roles(model, roles).named("block")
        self._kinds = [*range(len(self._blocks))] if every_block else _kinds(model, self._blocks)
        self._stretch = _longest_stretch(self._kinds)

    def records(self, step: SimulatedStep, ranks: Sequence[int]) -> list[StepRecord]:
        """Those of `ranks`, which are the first of each stage, or any one."""
        last = len(ranks) - 1
        known = self._simulated(step, ranks, {0, last})
        groups: dict[Hashable, list[int]] = {}
        for index in range(1, last):
            groups.setdefault(self._kinds_of(known[0].pipeline[index]), []).append(index)
        known |= self._simulated(
            step, ranks, {group[at] for group in groups.values() for at in (0, len(group) // 2, -1)}
        )
        for group in groups.values():
            known = self._between(known, group) | known
        known |= self._simulated(step, ranks, {*range(len(ranks))} - known.keys())
        return [known[index] for index in range(len(ranks))]

    def _simulated(self, step: SimulatedStep, ranks: Sequence[int], indices: Collection[int]) -> dict[int, StepRecord]:
        found = in_children([functools.partial(self.record, step, ranks[index]) for index in sorted(indices)])
        return dict(zip(sorted(indices), found, strict=True))

    def _between(self, known: Mapping[int, StepRecord], group: Sequence[int]) -> dict[int, StepRecord]:
        """Ranks on the line through the first and the last of a group, if the one in its middle lies on it."""
        first, middle, last = (known[group[at]] for at in (0, len(group) // 2, -1))
        under_way = [first.pipeline[index].under_way for index in group]
        way = under_way[-1] - under_way[0]
        found: dict[int, StepRecord] = {}
        for index, mine in zip(group, under_way, strict=True):
            if way or mine == under_way[0]:
                record = first.towards(last, mine - under_way[0], way or 1)
                if record is not None:
                    found[index] = record
        between = found.get(group[len(group) // 2])
        return found if between is not None and between.agrees_with(middle) else {}

    def _kinds_of(self, rank: PipelineRank) -> Hashable:
        """What makes two ranks alike. Those of several stages are not: what is under way is of one or of another."""
        if len(rank.blocks) > 1:
            return (*rank.blocks,)
        return tuple(self._kinds[block] for block in rank.blocks[0])

    def record(self, step: SimulatedStep, rank: int) -> StepRecord:
        """What `rank` holds, computes and sends in `step`."""
        few, period = _few_batches(step.parallelism)
        if step.num_batches <= few + period or step.num_batches % period:
            return self._over_blocks(step, rank)

        def simulated(number: int) -> StepRecord:
            return self._over_blocks(step.changed(num_batches=number, order_of=step.num_batches), rank)

        return extrapolated(simulated, few, period, step.num_batches) or self._over_blocks(step, rank)

    def _over_blocks(self, step: SimulatedStep, rank: int) -> StepRecord:
        stretch, replayed = self._stretch, _period_of(step.activation_checkpoint)
        if stretch is None or replayed is None or step.parallelism.pipeline_parallel_degree > 1:
            return simulate(step, rank)
        period, number = math.lcm(stretch.period, replayed), stretch.stop - stretch.start
        few = max(FEW_BLOCKS, 2 * period)
        few += (number - few) % period
        if few + 2 * period >= number:
            return simulate(step, rank)

        def simulated(kept: int) -> StepRecord:
            left_out = self._blocks[stretch.start + kept : stretch.stop]
            return simulate(step.changed(without=tuple(left_out)), rank)

        return extrapolated(simulated, few, period, number) or simulate(step, rank)


@dataclass(frozen=True)
class Stretch:
    """Blocks of a stack, `start` to `stop`, that repeat themselves after `period`."""

    start: int
    stop: int
    period: int


def _longest_stretch(kinds: Sequence[int]) -> Stretch | None:
    """The stretch in which most blocks repeat others; None where there is none."""
    best = None
    for period in range(1, len(kinds) // 2):
        repeats = [kinds[i] == kinds[i + period] for i in range(len(kinds) - period)]
        start = 0
        for is_repeated, run in itertools.groupby(repeats):
            length = len([*run])
            if is_repeated and (best is None or length > best.stop - best.start - best.period):
                best = Stretch(start, start + length + period, period)
            start += length
    return best


def _few_batches(parallelism: ParallelDims.Config) -> tuple[int, int]:
    """How many micro-batches fill a pipeline, and after how many more it does the same again."""
    num_ranks = parallelism.pipeline_parallel_degree
    if num_ranks == 1:
        return FEW_BATCHES, 1
    from titan_parallel.pipeline_parallel.schedule_registry import TRAITS

    schedule = TRAITS.get(parallelism.pipeline_parallel_schedule)
    one_stage_each = schedule is not None and schedule.stages_per_rank == 1
    return (num_ranks + 1, 1) if one_stage_each else (FEW_BATCHES * num_ranks, num_ranks)


def _period_of(recomputation: ActivationCheckpoint.Config | None) -> int | None:
    """After how many blocks recomputation does the same again; None: it has no such number."""
    return 1 if recomputation is None else recomputation.build().period


def _kinds(model: nn.Module, blocks: list[str]) -> list[int]:
    """A number for each block, the same for those that are alike; all differ where they are no plain list."""
    parents = {name.rpartition(".")[0] for name in blocks}
    if len(parents) != 1 or not isinstance(model.get_submodule(parents.pop()), nn.ModuleList | nn.Sequential):
        return [*range(len(blocks))]
    met: list[tuple[int, dict[Hashable, Any]]] = []
    kinds = []
    for number, name in enumerate(blocks):
        kind = _kind(model.get_submodule(name))
        same = (index for index, (first, other) in enumerate(met) if _same(other, first, kind, number))
        index = next(same, len(met))
        if index == len(met):
            met.append((number, kind))
        kinds.append(index)
    return kinds


def _kind(block: nn.Module) -> dict[Hashable, Any]:
    """What a block is made of: types, shapes and settings of its parts."""
    kind: dict[Hashable, Any] = {}
    for name, part in block.named_modules():
        kind[name] = type(part)
        for key, value in vars(part).items():
            if isinstance(value, bool | int | float | str) or is_dataclass(value):
                kind |= _settings((name, key), value)
    kind |= {(name, "parameter"): (tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()}
    return kind


def _settings(place: tuple[Hashable, ...], value: Any) -> Iterator[tuple[Hashable, Any]]:
    """The plain values that `value` is or holds; how weights begin, which changes no step, is left out."""
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype):
        yield place, value
    elif is_dataclass(value):
        yield place, type(value)
        for field in fields(value):
            if "init" not in field.name.split("_"):
                yield from _settings((*place, field.name), getattr(value, field.name, None))
    elif isinstance(value, list | tuple | dict):
        yield place, len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _settings((*place, key), item)


def _same(kind: dict[Hashable, Any], number: int, other: dict[Hashable, Any], other_number: int) -> bool:
    """Whether two blocks are alike, but for their own numbers, which they may know."""
    return kind.keys() == other.keys() and all(
        value == other[key] or (value, other[key]) == (number, other_number) for key, value in kind.items()
    )
