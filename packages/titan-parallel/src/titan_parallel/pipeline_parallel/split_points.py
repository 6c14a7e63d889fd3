"""Where one stage of a pipeline ends and the next begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_config import ConfigError


@dataclass(frozen=True)
class StageCut:
    """Where a model is cut, and which stages are to be compared: the others are other ranks'."""

    ranges: Sequence[range]
    """The numbers of the blocks of each stage."""
    mine: Sequence[int]
    num_ranks: int


def cut_by_name(blocks: Sequence[str], splits: Sequence[str], num_stages: int) -> list[range]:
    """The blocks of each stage, where `splits` names the first block of all stages but the first."""
    if len(splits) != num_stages - 1:
        raise ConfigError(
            f"Got {len(splits)} pipeline_parallel_splits for {num_stages} stages. Each names the block at which the "
            f"next stage begins. Name {num_stages - 1}, or change pipeline_parallel_stages_per_rank."
        )
    if unknown := [name for name in splits if name not in blocks]:
        raise ConfigError(
            f"Got {unknown[0]!r} in pipeline_parallel_splits, which is no block. A stage begins at a module with the "
            f"role block. Name some of {blocks[0]} to {blocks[-1]}."
        )
    starts = [0, *(blocks.index(name) for name in splits)]
    if any(start >= following for start, following in itertools.pairwise(starts)):
        raise ConfigError(
            f"Got pipeline_parallel_splits {list(splits)}. Stages follow each other in the order of the blocks, and "
            "each has one or more. Name later blocks one after the other, without the first."
        )
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def cut_by_cost(costs: Sequence[int], num_stages: int, last: int = 0) -> list[range]:
    """Cut a row of blocks into stages of one block or more, so that the dearest stage is as cheap as can be.

    `last` is what the last stage does besides its blocks. Of the cuts that are as good the most even one is taken.
    """
    num_blocks = len(costs)
    sums = [sum(costs[:stop]) for stop in range(num_blocks + 1)]

    def cost(start: int, stop: int) -> int:
        return sums[stop] - sums[start] + (last if stop == num_blocks else 0)

    def best(price: Callable[[float, int], float]) -> tuple[float, list[int]]:
        """The cheapest way, `price` telling what a stage adds to what came before, and where stages begin."""
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
