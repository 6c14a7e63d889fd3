"""Data parallelism as a transform of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.sharding_plan.roles import RoleSpec
from titan_parallel.sharding_plan.units import check_weights_of_units, units_of, with_role_errors
from titan_parallel.transforms import ParallelBuild


class DataParallelism:
    """Weights, gradients and optimizer state over the data and context axes by FSDP2, in the precisions of a run.

    One rank that computes in the dtype it stores needs no FSDP: it runs as fast as the plain model.
    """

    roles: Mapping[str, RoleSpec] = {
        "embedding": RoleSpec(options={"between_blocks"}),
        "block": RoleSpec(options={"streams"}),
        "unit": RoleSpec(options={"streams"}),
        "head": RoleSpec(options={"takes_loss"}),
    }

    def __init__(self, precision: MixedPrecision | None) -> None:
        """`precision` None: weights compute in the dtype they are stored in."""
        self._precision = precision

    def validate(self, build: ParallelBuild) -> None:
        if build.dims.world_size > 1:
            check_weights_of_units(build.model, build.roles)

    def apply(self, build: ParallelBuild) -> None:
        model, dims, precision = build.model, build.dims, self._precision
        if dims.world_size > 1:
            model.forward = with_role_errors(model.forward, build.roles)
        if precision is not None and (precision.param_dtype is not torch.float32 or precision.changes(model)):
            streams = {unit: build.roles.streams_of(name) for name, unit in units_of(model, build.roles).items()}
            precision.cast_inputs(model, streams)
        if dims.world_size == 1 and (precision is None or not precision.changes(model)):
            return
        from titan_parallel.data_parallel.fsdp import shard_over_data_ranks

        build.units = shard_over_data_ranks(model, build.roles, dims, precision, build.root)
