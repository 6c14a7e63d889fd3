"""Tensor and sequence parallelism as a transform of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.roles import RoleSpec
from titan_parallel.sharding_plan.units import units_of
from titan_parallel.transforms import ParallelBuild


class TensorParallelism:
    """The features of regions over the tensor axis, and the residual stream over the sequence between regions."""

    roles: Mapping[str, RoleSpec] = {
        "embedding": RoleSpec(options={"between_blocks"}),
        "block": RoleSpec(options={"streams"}),
        "unit": RoleSpec(options={"streams"}),
        "region": RoleSpec(options={"set", "streams"}),
        "colwise": RoleSpec(options={"num_heads", "num_kv_heads", "packed", "transposed", "border", "set"}),
        "rowwise": RoleSpec(options={"transposed", "border"}),
        "norm": RoleSpec(options={"num_heads", "num_kv_heads"}),
        "per_head": RoleSpec(of_parameters=True),
        "head": RoleSpec(options={"takes_loss"}),
    }

    def __init__(self, resolve: Callable[[ParallelBuild], ParallelDims]) -> None:
        """`resolve` returns the dims with sequence parallelism on or off, or raises ConfigError."""
        self._resolve = resolve

    def validate(self, build: ParallelBuild) -> None:
        build.dims = self._resolve(build)

    def apply(self, build: ParallelBuild) -> None:
        if build.dims.tp_size == 1:
            return
        from titan_parallel.tensor_parallel.apply import TensorParallel

        model, roles = build.model, build.roles
        tensor_parallel = TensorParallel(model, roles, build.dims)
        for name, unit in units_of(model, roles).items():
            view = build.parameter_views[unit] = tensor_parallel.local_view(name)
            unit.forward = view(unit.forward)
        if roles.head is not None:
            build.head = tensor_parallel.head_forward(roles.head)
        model.forward = tensor_parallel.local_view("")(model.forward)
        partial = tensor_parallel.partial_gradients

        def summed_at_the_end(_denominator: float | Tensor) -> AbstractContextManager[None]:
            return partial.summed_at_the_end(model)

        build.step.backward_contexts.insert(0, summed_at_the_end)  # the outermost: it sums what the others leave
