"""The pipeline parallelism transform of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from titan_config import ConfigError

from titan_parallel.pipeline_parallel.split_points import StageCut
from titan_parallel.sharding_plan.roles import RoleSpec
from titan_parallel.step.batch import BatchCheck
from titan_parallel.step.gradient_accumulation import Schedule
from titan_parallel.transforms import ParallelBuild


class PipelineParallelism:
    """Splits the stack of blocks over the pipeline axis: each rank keeps the modules of its stages."""

    roles: Mapping[str, RoleSpec] = {
        "block": RoleSpec(options={"streams"}),
        "embedding": RoleSpec(options={"between_blocks"}),
    }

    def __init__(
        self,
        prove: Callable[[ParallelBuild], Callable[[StageCut], BatchCheck]],
        *,
        param_dtype: torch.dtype | None,
        recomputes: bool,
        compiles: bool,
    ) -> None:
        """`prove(build)(cut)` returns a check that stages exchange hidden states only; both may raise ConfigError.

        `param_dtype` is the dtype to which blocks cast hidden states (None: no cast). `recomputes` and `compiles` say
        whether blocks use activation checkpointing and `torch.compile`.
        """
        self._prove = prove
        self._param_dtype = param_dtype
        self._recomputes = recomputes
        self._compiles = compiles

    def validate(self, build: ParallelBuild) -> None:
        if build.dims.pp_size == 1:
            return
        from titan_parallel.pipeline_parallel.schedule_registry import schedule_of

        stacks = build.roles.stacks
        if len(stacks) > 1:
            raise ConfigError(
                f"pipeline_parallel_degree must be 1 for several stacks of blocks, got {build.dims.pp_size} with "
                f"blocks in {' and in '.join(parent or 'the model' for parent in stacks)}. Give the role block to one "
                "list of layers (and unit to the others), or set pipeline_parallel_degree to 1."
            )
        if any(build.roles.streams_of(name) > 1 for name in build.roles.named("block")):
            raise ConfigError(
                f"pipeline_parallel_degree must be 1 for blocks of several residual streams, got {build.dims.pp_size}."
            )
        self._schedule = schedule_of(build.dims)
        if self._compiles and self._schedule.splits_backward:
            raise ConfigError(
                "pipeline_parallel_schedule must not split the backward into inputs and weights for compiled blocks, "
                f"got {self._schedule.name}. Choose 1F1B or Interleaved1F1B, or set compile to None."
            )
        self._check = self._prove(build)

    def apply(self, build: ParallelBuild) -> None:
        if build.dims.pp_size == 1:
            return
        from titan_parallel.pipeline_parallel.partition import Stages
        from titan_parallel.pipeline_parallel.schedule import Pipeline
        from titan_parallel.pipeline_parallel.stage_runner import StageRunner

        stages = Stages(
            build.model,
            build.roles,
            self._schedule,
            build.dims,
            check=self._check,
            dtype=self._param_dtype,
            recomputes=self._recomputes,
        )

        def make_schedule() -> Schedule:
            assert isinstance(build.root, StageRunner)
            return Pipeline(build.root, stages, build.units)

        build.roles = build.roles.without(stages.taken_out)
        build.wrap_root, build.make_schedule = stages.around, make_schedule
        build.step.nonlocal_parameters = stages.nonlocal_parameters
        build.step.duplicate_parameters = stages.duplicate_parameters
        build.consistency["pipeline schedule"] = repr(self._schedule)
