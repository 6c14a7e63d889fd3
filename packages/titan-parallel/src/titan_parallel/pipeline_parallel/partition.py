"""Split a model into stages, and remove the parameters and buffers that a rank does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from titan_config import ConfigError
from torch import nn

from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.pipeline_parallel.schedule_registry import PipelineSchedule
from titan_parallel.pipeline_parallel.shape_probe import StageProbe
from titan_parallel.pipeline_parallel.split_points import StageCut, cut_by_cost, cut_by_name
from titan_parallel.pipeline_parallel.stage_forward import StageForward, StageModel
from titan_parallel.pipeline_parallel.stage_modules import StageModules
from titan_parallel.pipeline_parallel.stage_runner import StageRunner
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.step.batch import BatchCheck
from titan_parallel.step.forward_loss import LossForward


class Stages:
    """A model split at its blocks into the stages of a schedule; each rank keeps only the modules of its stages.

    Embeddings belong to the first stage. The head and modules defined after the last block belong to the last stage.
    All stages hold all other modules, because every block may read values computed before the blocks. The gradient of
    a weight held by several ranks is the sum of their gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Roles,
        schedule: PipelineSchedule,
        dims: ParallelDims,
        *,
        check: Callable[[StageCut], BatchCheck],
        dtype: torch.dtype | None,
        recomputes: bool,
    ) -> None:
        """Split `model` in place.

        `dtype` is the dtype in which weights compute (None: the dtype in which they are stored). `recomputes` says
        whether blocks use activation checkpointing. Raises ConfigError for a model that cannot be split into stages.
        """
        self.schedule = schedule
        self.dims = dims
        self.dtype = dtype
        self.rank = dims.mesh.get_local_rank("pp")
        self.mine = [stage for stage, rank in enumerate(schedule.ranks) if rank == self.rank]
        self._model = model
        pieces = StageModules.of(model, roles, dims.pp_size)
        self._ranges = self._cut(pieces)
        self._check = check(StageCut(self._ranges, self.mine, dims.pp_size))
        self._parts = StageModel.of(model, roles, pieces, dtype)
        owners = self._owners(pieces)
        holders = self._holders(owners)
        self._holders_by_name = {
            name: holders[parameter]
            for name, parameter in model.named_parameters()
            if len(holders[parameter]) > 1 and self.rank in holders[parameter]
        }
        whole = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.splits_backward = not (
            recomputes  # a split backward would recompute twice
            or dims.config.fsdp_reshard_after_forward == "always"  # weights would be freed between the two halves
            or self._trains_what_all_hold(owners)  # gradients of several blocks share one graph
        )
        self._strip(owners, holders)
        here = dict(model.named_parameters())
        self.nonlocal_parameters = [name for name in whole if name not in here]
        """Names of the trained parameters that other ranks hold and this rank does not."""
        named = {**pieces.embeddings, **pieces.blocks, **pieces.after}
        self.taken_out = [name for name, module in named.items() if not any(True for _ in module.parameters())]
        """Names of the modules (embeddings, blocks, modules after them) of which this rank holds no parameters."""

    def blocks_of_ranks(self) -> list[list[range]]:
        """Return, for each rank of the pipeline, the block numbers of each of its stages."""
        ranks = self.schedule.ranks
        return [
            [own for own, of in zip(self._ranges, ranks, strict=True) if of == rank] for rank in range(max(ranks) + 1)
        ]

    @property
    def held_by_all(self) -> list[str]:
        """Names of the weights that every rank of the pipeline holds."""
        return [name for name, ranks in self._holders_by_name.items() if len(ranks) == self.dims.pp_size]

    @property
    def held_by_ends(self) -> list[str]:
        """Names of the weights that only the ranks of the first and last stage hold, where this rank is one of them."""
        return [name for name, ranks in self._holders_by_name.items() if len(ranks) < self.dims.pp_size]

    @property
    def duplicate_parameters(self) -> list[str]:
        """Names of the weights whose gradients another rank counts in the norm: the lowest rank that holds them."""
        return [name for name, ranks in self._holders_by_name.items() if min(ranks) != self.rank]

    def around(self, forward: LossForward) -> StageRunner:
        """Return the module that runs the stages of this rank."""
        tokens = self.dims.tp_size if self.dims.sequence_parallel else 1
        return StageRunner(
            forward,
            {stage: StageForward(self._parts, self._ranges[stage]) for stage in self.mine},
            StageProbe(self._parts, has_end=self.schedule.num_stages - 1 in self.mine),
            self._check,
            num_token_parts=tokens,
            dtype=self.dtype,
        )

    def _owners(self, pieces: StageModules) -> dict[nn.Module, set[int]]:
        """Return the ranks that run each module: of the embeddings, the blocks, and the modules after them."""
        ranks, owners = self.schedule.ranks, dict[nn.Module, set[int]]()
        stages = [(0, list(pieces.embeddings.values())), (len(ranks) - 1, list(pieces.after.values()))]
        blocks = list(pieces.blocks.values())
        stages += [(stage, blocks[own.start : own.stop]) for stage, own in enumerate(self._ranges)]
        for stage, modules in stages:
            for module in (inner for piece in modules for inner in piece.modules()):
                owners.setdefault(module, set()).add(ranks[stage])
        return owners

    def _holders(self, owners: dict[nn.Module, set[int]]) -> dict[nn.Parameter, set[int]]:
        """Return the pipeline ranks that hold each parameter. Raises ConfigError for unsupported sharing."""
        everyone, ends = set(range(self.dims.pp_size)), {self.schedule.ranks[0], self.schedule.ranks[-1]}
        holders: dict[nn.Parameter, set[int]] = {}
        for module in self._model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    held = holders.setdefault(parameter, set())
                    held |= owners.get(module, everyone)
        for name, parameter in self._model.named_parameters():
            held = holders[parameter]
            if len(held) > 1 and held not in (everyone, ends):
                raise ConfigError(
                    "A shared weight must be on one pipeline rank, on the ranks of the first and last stage, or on all "
                    f"ranks, got {name} on ranks {sorted(held)}. Set pipeline_parallel_splits so that the blocks "
                    "that share the weight are on one rank."
                )
        return holders

    def _trains_what_all_hold(self, owners: dict[nn.Module, set[int]]) -> bool:
        others = (module for module in self._model.modules() if module not in owners)
        return any(p is not None and p.requires_grad for module in others for p in module._parameters.values())

    def _strip(self, owners: dict[nn.Module, set[int]], holders: dict[nn.Parameter, set[int]]) -> None:
        """Replace the parameters and buffers that this rank does not hold by None; other names do not change."""
        for module, ranks in owners.items():
            if self.rank not in ranks:
                for name, parameter in module._parameters.items():
                    if parameter is not None and self.rank not in holders[parameter]:
                        module._parameters[name] = None
                module._buffers.update(dict.fromkeys(module._buffers))

    def _cut(self, pieces: StageModules) -> list[range]:
        splits, num_stages = self.dims.config.pipeline_parallel_splits, self.schedule.num_stages
        if splits:
            return cut_by_name(list(pieces.blocks), splits, num_stages)
        if len(pieces.blocks) < num_stages:
            raise ConfigError(
                f"A pipeline must have a block for each stage, got {len(pieces.blocks)} blocks for {num_stages} "
                "stages. Lower pipeline_parallel_degree or pipeline_parallel_stages_per_rank."
            )
        costs = [_size([block]) for block in pieces.blocks.values()]
        return cut_by_cost(costs, num_stages, last=_size(pieces.after.values()))


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
