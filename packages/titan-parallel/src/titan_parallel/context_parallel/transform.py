"""Context parallelism as a transform of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from titan_config import ConfigError

from titan_parallel._transformers import is_transformers_model
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.roles import Roles, RoleSpec
from titan_parallel.step.batch import BatchCheck
from titan_parallel.transforms import ParallelBuild


class ContextParallelism:
    """The tokens of each sequence over the context axis; ranks meet in the attention cores."""

    roles: Mapping[str, RoleSpec] = {"attention": RoleSpec()}

    def __init__(self, prove: Callable[[ParallelBuild], Callable[[], BatchCheck]]) -> None:
        """`prove(build)()` checks that no other module of the model mixes tokens, or raises ConfigError."""
        self._prove = prove

    def validate(self, build: ParallelBuild) -> None:
        if build.dims.cp_size == 1:
            return
        if build.roles.with_several_streams:
            raise ConfigError(
                f"context_parallel_degree must be 1 for blocks of several residual streams, got {build.dims.cp_size}."
            )
        if not build.roles.named("attention") and not is_transformers_model(build.model):
            raise ConfigError(
                "context_parallel_degree must be 1 without a module of the role attention, got "
                f"{build.dims.cp_size}. Give the role to the modules that compute core(q, k, v, mask, scale)."
            )
        if build.dims.config.context_parallel_method == "ulysses":
            _check_heads(build.roles, build.dims)
        self._check = self._prove(build)

    def apply(self, build: ParallelBuild) -> None:
        if build.dims.cp_size == 1:
            return
        from titan_parallel.context_parallel.shared_sequences import SharedSequences

        shared = SharedSequences(build.model, build.roles, build.dims, self._check)
        build.step.sequence_sharding = shared
        build.step.contexts.append(shared.sharing)
        build.step.batch_checks.append(shared.check)
        build.step.loss_checks.append(shared.check_loss)


def _check_heads(roles: Roles, dims: ParallelDims) -> None:
    """Raise ConfigError where the heads of a region cannot be exchanged; query heads are the most of a region."""
    from titan_parallel.context_parallel.ulysses import check_heads_divide

    for region in roles.named("region"):
        options = [roles.options(name) for name in roles.named("colwise") if roles.region_of(name) == region]
        counts = [its["num_heads"] for its in options if "num_heads" in its]
        if counts and max(counts) % dims.tp_size == 0:
            check_heads_divide(max(counts) // dims.tp_size, dims.cp_size)
