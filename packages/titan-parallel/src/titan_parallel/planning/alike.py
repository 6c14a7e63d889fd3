"""Blocks and micro-batches that are alike need not all be simulated: what a few cost tells what many do, exactly.

Everything a step sums grows by the same amount with each further block, and with each further micro-batch after the
first and before the last. So does what is alive at any one place of the step, at its fullest. And where the stages
between the first and the last are alike, they differ by how many micro-batches are under way.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import nn

from titan_parallel.activation_checkpoint import ActivationCheckpoint
from titan_parallel.planning.record import PipelineRank, Record, extrapolated
from titan_parallel.planning.simulate import Step, simulate
from titan_parallel.roles import Roles

FEW_BLOCKS = 4
FEW_BATCHES = 2


class Alike:
    """Simulates steps of one model as far as it must be."""

    def __init__(self, step: Step, every_block: bool = False) -> None:
        """`every_block`: leave none out."""
        model, roles = step.built()
        self.name, self.num_parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
        self._blocks = Roles(model, roles).named("block")
        self._period = None if every_block else _period(model, self._blocks)

    def records(self, step: Step, ranks: Sequence[int]) -> list[Record]:
        """Those of `ranks`, which are the first of each stage, or any one."""
        last = len(ranks) - 1
        first = sorted({0, 1, last // 2, last - 1, last} & {*range(len(ranks))})
        known = {index: self.record(step, ranks[index]) for index in first}
        if len(known) < len(ranks):
            known = self._between(known, last) | known
        return [known.get(index) or self.record(step, rank) for index, rank in enumerate(ranks)]

    def _between(self, known: Mapping[int, Record], last: int) -> dict[int, Record]:
        """Ranks on the line through the second and the last but one, if the one in the middle lies on it."""
        ranks, second, end = known[1].pipeline, known[1], known[last - 1]
        way = ranks[last - 1].under_way - ranks[1].under_way
        found: dict[int, Record] = {}
        for index in range(2, last - 1):
            more = ranks[index].under_way - ranks[1].under_way
            if self._part_of_period(ranks[index]) == self._part_of_period(ranks[1]) and (way or not more):
                record = second.towards(end, more, way or 1)
                if record is not None:
                    found[index] = record
        middle = found.get(last // 2)
        return found if middle is not None and middle.agrees_with(known[last // 2]) else {}

    def _part_of_period(self, rank: PipelineRank) -> Hashable:
        """What makes two ranks alike. Those of several stages are not: what is under way is of one or of another."""
        if self._period is None or len(rank.blocks) > 1:
            return (*rank.blocks,)
        return tuple((blocks.start % self._period, len(blocks)) for blocks in rank.blocks)

    def record(self, step: Step, rank: int) -> Record:
        """What `rank` holds, computes and sends in `step`."""
        num_stages = step.parallelism.pipeline_parallel_degree
        few = FEW_BATCHES * num_stages
        if step.num_batches <= few + num_stages or step.num_batches % num_stages:
            return self._over_blocks(step, rank)

        def simulated(number: int) -> Record:
            return self._over_blocks(step.changed(num_batches=number, order_of=step.num_batches), rank)

        return extrapolated(simulated, few, num_stages, step.num_batches) or self._over_blocks(step, rank)

    def _over_blocks(self, step: Step, rank: int) -> Record:
        number, period = len(self._blocks), self._period_with(step.activation_checkpoint)
        if period is None or step.parallelism.pipeline_parallel_degree > 1:
            return simulate(step, rank)
        few = max(FEW_BLOCKS, 2 * period)
        few += (number - few) % period
        if few + 2 * period >= number:
            return simulate(step, rank)
        record = extrapolated(
            lambda kept: simulate(step.changed(without=tuple(self._blocks[kept:])), rank), few, period, number
        )
        return record or simulate(step, rank)

    def _period_with(self, recomputation: ActivationCheckpoint.Config | None) -> int | None:
        replayed = 1 if recomputation is None else recomputation.build().period
        return None if self._period is None or replayed is None else math.lcm(self._period, replayed)


def _period(model: nn.Module, blocks: list[str]) -> int | None:
    """After how many blocks they repeat themselves; None where they do not, or are no plain list."""
    parents = {name.rpartition(".")[0] for name in blocks}
    if len(parents) != 1 or not isinstance(model.get_submodule(parents.pop()), nn.ModuleList | nn.Sequential):
        return None
    kinds = [_kind(model.get_submodule(name)) for name in blocks]

    def repeats(period: int) -> bool:
        return all(_same(kinds[i], i, kinds[i + period], i + period) for i in range(len(blocks) - period))

    return next((period for period in range(1, len(blocks) // 2) if repeats(period)), None)


def _kind(block: nn.Module) -> dict[Hashable, Any]:
    """What a block is made of: types, shapes and settings of its parts."""
    kind: dict[Hashable, Any] = {}
    for name, part in block.named_modules():
        kind[name] = type(part)
        settings = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        kind |= {(name, key): value for key, value in settings.items()}
    kind |= {(name, "parameter"): (tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()}
    return kind


def _same(kind: dict[Hashable, Any], number: int, other: dict[Hashable, Any], other_number: int) -> bool:
    """Whether two blocks are alike, but for their own numbers, which they may know."""
    return kind.keys() == other.keys() and all(
        value == other[key] or (value, other[key]) == (number, other_number) for key, value in kind.items()
    )
