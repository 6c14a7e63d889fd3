"""Checks for the transforms of a model, all from one probe that is made before the model is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.pipeline_parallel.split_points import StageCut
from titan_parallel.probe.checks import ContextCheck, StageCheck, decide_sequence_parallel
from titan_parallel.probe.model_probe import ModelProbe
from titan_parallel.sharding_plan.validation import has_ends
from titan_parallel.step.batch import BatchCheck

if TYPE_CHECKING:
    from titan_parallel.transforms import ParallelBuild


class Proofs:
    """Checks from one probe of a model, which is made when the first check needs it."""

    def __init__(self) -> None:
        self._probe: ModelProbe | None = None

    def context(self, build: ParallelBuild) -> Callable[[], BatchCheck]:
        """Return a function that makes the check of context parallelism, or raises ConfigError.

        The check: everything but attention cores is token-wise.
        """
        probe, dims = self._probe_of(build), build.dims
        return lambda: ContextCheck(probe, dims)

    def stages(self, build: ParallelBuild) -> Callable[[StageCut], BatchCheck]:
        """Return a function that makes the check that stages exchange only hidden states, or raises ConfigError."""
        probe = self._probe_of(build)
        return lambda cut: StageCheck(probe, cut)

    def tensor(self, build: ParallelBuild) -> ParallelDims:
        """Return the dims with sequence parallelism on or off. Raises ConfigError for a model that cannot be split."""
        asks = build.dims.sequence_parallel and has_ends(build.roles)
        return decide_sequence_parallel(build.model, build.roles, build.dims, self._probe_of(build) if asks else None)

    def _probe_of(self, build: ParallelBuild) -> ModelProbe:
        if self._probe is None:
            self._probe = ModelProbe(build.model, build.roles)
        return self._probe
