"""Blocks and micro-batches that are alike need not all be simulated: what a few cost tells what many do, exactly.

Everything a step sums grows by the same amount with each further block, and with each further micro-batch after the
first and before the last. So does what is alive at any one place of the step, at its fullest.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from torch import nn

from titan_parallel.activation_checkpoint import ActivationCheckpoint
from titan_parallel.planning.record import Record, extrapolated
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
    kinds = [_kind(model.get_submodule(name), index) for index, name in enumerate(blocks)]
    periods = range(1, len(blocks) // 2)
    return next((p for p in periods if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))), None)


def _kind(block: nn.Module, index: int) -> list[Hashable]:
    """What a block is made of: types, shapes and settings of its parts, but for its own number."""
    kind: list[Hashable] = []
    for name, part in block.named_modules():
        settings = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        settings = {key: value for key, value in settings.items() if type(value) is not int or value != index}
        kind.append((name, type(part), tuple(sorted(settings.items()))))
    kind.extend((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return kind
