"""The stages of a model: which part of it is whose, and what a rank does not hold is taken out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from titan_config import ConfigError
from torch import nn

from titan_parallel.dims import ParallelDims
from titan_parallel.loss_forward import LossForward
from titan_parallel.pipeline import Pipeline
from titan_parallel.pipeline_schedules import PipelineSchedule
from titan_parallel.roles import Roles, inside
from titan_parallel.stage_cut import cut_by_cost, cut_by_name
from titan_parallel.stage_forward import StageForward
from titan_parallel.stage_runner import StageRunner

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Piece:
    """A block, or a largest module with parameters and without a block; `stage` holds it."""

    name: str
    module: nn.Module
    stage: int


class Stages:
    """A model cut into the stages of a schedule, by its blocks; of the model a rank keeps what its stages hold.

    What is defined before the first block belongs to the first stage, as embeddings do, what comes after the last
    block to the last, as the head does; modules without parameters belong to all. Weights that first and last stage
    share are held by both, under all their names.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Roles,
        schedule: PipelineSchedule,
        dims: ParallelDims,
        *,
        dtype: torch.dtype | None,
        recomputes: bool,
    ) -> None:
        """`dtype` is what weights compute in (None: what they are stored in)."""
        self.schedule = schedule
        self.dims = dims
        self.rank = dims.mesh.get_local_rank("pp")
        self.mine = [stage for stage, rank in enumerate(schedule.ranks) if rank == self.rank]
        # Splitting the backward would recompute twice, and find weights freed after the forward.
        self.splits_backward = not recomputes and dims.config.fsdp_reshard_after_forward != "always"
        self._names = roles.named("block")
        self._blocks = [model.get_submodule(name) for name in self._names]
        before, after = _around(model, roles, self._blocks)
        self._ranges = self._cut(_size(module for _, module in after))
        last = schedule.num_stages - 1
        stage_of = {block: stage for stage, own in enumerate(self._ranges) for block in own}
        self._pieces = [
            *(Piece(name, module, 0) for name, module in before),
            *(Piece(self._names[i], block, stage_of[i]) for i, block in enumerate(self._blocks)),
            *(Piece(name, module, last) for name, module in after),
        ]
        self._before = {module: _skeleton(module, dtype) for _, module in before}
        self._after = [module for _, module in after]
        tied = self._find_tied()
        names = [name for name, parameter in model.named_parameters() if parameter in tied]
        self.tied_over_ranks = names if schedule.ranks[0] != schedule.ranks[-1] else []
        """Weights of which the first and the last rank of the pipeline hold one each."""
        whole = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._strip()
        here = dict(model.named_parameters())
        self.names_elsewhere = [name for name in whole if name not in here]
        """The parameters that other ranks train, and this one does not have."""
        self.held = [piece.name for piece in self._pieces if any(True for _ in piece.module.parameters())]
        """The names of the pieces of which this rank has parameters."""

    def blocks_of_ranks(self) -> list[list[range]]:
        """For each rank of the pipeline, the numbers of the blocks that its stages hold."""
        ranks = self.schedule.ranks
        return [
            [own for own, of in zip(self._ranges, ranks, strict=True) if of == rank] for rank in range(max(ranks) + 1)
        ]

    @property
    def counted_elsewhere(self) -> list[str]:
        """Weights whose gradients the first rank of the pipeline counts, not this one."""
        return self.tied_over_ranks if self.rank == self.schedule.ranks[-1] else []

    def around(self, forward: LossForward) -> StageRunner:
        """What runs this rank's stages."""

        def stage(own: range) -> StageForward:
            return StageForward(
                forward.model,
                blocks=self._blocks,
                own=own,
                shapes={} if own.start == 0 and own else self._before,
                after=[] if own.stop == len(self._blocks) else self._after,
            )

        tokens = self.dims.num_tensor if self.dims.sequence_parallel else 1
        self._runner = StageRunner(forward, {i: stage(self._ranges[i]) for i in self.mine}, stage(range(0)), tokens)
        return self._runner

    def pipeline(self, units: Sequence[FSDPModule]) -> Pipeline:
        """The schedule, once `around` was made the root of the `units`."""
        return Pipeline(self._runner, self, units)

    def _strip(self) -> None:
        """Put None in the place of all parameters and buffers that this rank does not hold; names stay."""
        mine = [piece for piece in self._pieces if piece.stage in self.mine]
        held = {parameter for piece in mine for parameter in piece.module.parameters()}
        for piece in self._pieces:
            if piece.stage in self.mine:
                continue
            for module in piece.module.modules():
                for name, parameter in module._parameters.items():
                    module._parameters[name] = parameter if parameter in held else None
                module._buffers.update(dict.fromkeys(module._buffers))

    def _cut(self, after: int) -> list[range]:
        splits, num_stages = self.dims.config.pipeline_parallel_splits, self.schedule.num_stages
        if splits:
            return cut_by_name(self._names, splits, num_stages)
        if len(self._blocks) < num_stages:
            raise ConfigError(
                f"Got {len(self._blocks)} blocks for {num_stages} stages ({self.dims.num_pipeline} ranks, schedule "
                f"{self.schedule.name}). Each stage has one block or more. Lower pipeline_parallel_degree or "
                "pipeline_parallel_stages_per_rank, or take a schedule with fewer stages."
            )
        return cut_by_cost([_size([block]) for block in self._blocks], num_stages, last=after)

    def _find_tied(self) -> set[nn.Parameter]:
        """Weights of first and last stage. Raises ConfigError where stages share others."""
        owners: dict[nn.Parameter, set[int]] = {}
        for piece in self._pieces:
            for parameter in piece.module.parameters():
                owners.setdefault(parameter, set()).add(piece.stage)
        tied = {parameter for parameter, stages in owners.items() if stages == {0, self.schedule.num_stages - 1}}
        for piece in self._pieces:
            for name, parameter in piece.module.named_parameters():
                if len(owners[parameter]) > 1 and parameter not in tied:
                    raise ConfigError(
                        f"Got {piece.name}.{name}, a weight that stages {sorted(owners[parameter])} share. The first "
                        "and the last stage can share weights, others not. Cut the stack elsewhere with "
                        "pipeline_parallel_splits, or set pipeline_parallel_degree to 1."
                    )
        return tied


def _around(
    model: nn.Module, roles: Roles, blocks: list[nn.Module]
) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """The pieces with parameters before the first block and after the last, in the order of definition.

    An embedding is before, unless it is looked up between blocks, and the head after, wherever they are defined.
    """
    if not blocks:
        raise ConfigError(
            "Got pipeline_parallel_degree above 1 and roles without a block. A pipeline is cut between blocks. Give "
            "the role block to the layers of the model, or set pipeline_parallel_degree to 1."
        )
    embeddings = [name for name in roles.named("embedding") if not roles.options(name).get("between_blocks")]
    before: list[tuple[str, nn.Module]] = []
    after: list[tuple[str, nn.Module]] = []
    num_blocks = 0
    for name, module in _walk("", model, frozenset(blocks), set()):
        if module in blocks:
            num_blocks += 1
        elif not any(True for _ in module.parameters()):
            continue
        elif roles.head is not None and inside(roles.head, name):
            after.append((name, module))
        elif num_blocks == 0 or any(inside(embedding, name) for embedding in embeddings):
            before.append((name, module))
        elif num_blocks == len(blocks):
            after.append((name, module))
        else:
            raise ConfigError(
                f"Got {name} between two blocks. A stage holds blocks; what else has parameters is before or after all "
                "of them. Make it a part of a block, or set pipeline_parallel_degree to 1."
            )
    return before, after


def _walk(
    prefix: str, module: nn.Module, blocks: frozenset[nn.Module], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Blocks, and the largest modules without a block, once each. Raises ConfigError for parameters above blocks."""
    if bare := [name for name, parameter in module._parameters.items() if parameter is not None]:
        raise ConfigError(
            f"Got the parameter {prefix}{bare[0]} in a module that holds blocks. Nothing says which stage of a "
            "pipeline it belongs to. Put it into a module of its own before or after the blocks, or set "
            "pipeline_parallel_degree to 1."
        )
    for name, child in module.named_children():
        if child in blocks or blocks.isdisjoint(child.modules()):
            if child not in seen:
                seen.add(child)
                yield prefix + name, child
        else:
            yield from _walk(f"{prefix}{name}.", child, blocks, seen)


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _skeleton(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy on the meta device."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        own = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta", dtype=own), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)
