"""Split points of a pipeline: the blocks of each stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_config import ConfigError


@dataclass(frozen=True)
class StageCut:
    """The blocks of all stages, and the stages of this rank, which this rank compares with the whole model."""

    ranges: Sequence[range]
    """The block numbers of each stage."""
    mine: Sequence[int]
    num_ranks: int


def cut_by_name(blocks: Sequence[str], splits: Sequence[str], num_stages: int) -> list[range]:
    """Return the block numbers of each stage; `splits` names the first block of each stage after the first.

    Raises ConfigError for a wrong number of names, unknown names, and names out of order.
    """
    if len(splits) != num_stages - 1:
        raise ConfigError(
            f"pipeline_parallel_splits must have {num_stages - 1} names for {num_stages} stages (the first block of "
            f"each stage after the first), got {len(splits)}. Change it or pipeline_parallel_stages_per_rank."
        )
    if unknown := [name for name in splits if name not in blocks]:
        raise ConfigError(
            f"pipeline_parallel_splits must be names of blocks ({blocks[0]} to {blocks[-1]}), got {unknown[0]!r}. "
            "Blocks are the modules with the role block."
        )
    starts = [0, *(blocks.index(name) for name in splits)]
    if any(start >= following for start, following in itertools.pairwise(starts)):
        raise ConfigError(
            "pipeline_parallel_splits must be in the order of the blocks, without repetition and without the first "
            f"block, got {list(splits)}."
        )
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def cut_by_cost(costs: Sequence[int], num_stages: int, last: int = 0) -> list[range]:
    """Split a sequence of blocks into stages of at least one block, minimizing the cost of the most expensive stage.

    `costs` are those of the blocks, and `last` is the cost of the last stage besides its blocks, in the same unit.
    Among equally good splits, return the one with the smallest sum of squared stage costs.
    """
    num_blocks = len(costs)
    sums = [sum(costs[:stop]) for stop in range(num_blocks + 1)]

    def cost(start: int, stop: int) -> int:
        return sums[stop] - sums[start] + (last if stop == num_blocks else 0)

    def best(price: Callable[[float, int], float]) -> tuple[float, list[int]]:
        """Return the lowest total and the start of each stage; `price(total, cost)` adds a stage to a total."""
        table: list[tuple[float, list[int]]] = [(0, [])] + [(math.inf, [])] * num_blocks
        for stage in range(num_stages):
            done = stage == num_stages - 1
            ways: list[tuple[float, list[int]]] = [(math.inf, [])] * (num_blocks + 1)
            for stop in (num_blocks,) if done else range(stage + 1, num_blocks):
                candidates = ((price(table[start][0], cost(start, stop)), start) for start in range(stage, stop))
                value, start = min(candidates, key=lambda way: way[0])
                ways[stop] = (value, [*table[start][1], start])
            table = ways
        return table[num_blocks]

    dearest, _ = best(lambda before, own: max(before, own))
    _, starts = best(lambda before, own: before + own * own if own <= dearest else math.inf)
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], num_blocks], strict=True)]
