"""Checks of a model against the mesh, by a probe: sequence parallel, context parallel and pipeline stages."""

from __future__ import annotations

import logging

import torch.distributed as dist
from titan_config import ConfigError
from torch import nn

from titan_parallel._torch.distributed import has_no_memory
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.pipeline_parallel.split_points import StageCut
from titan_parallel.probe.model_probe import ModelProbe
from titan_parallel.probe.verdict import Verdict
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.sharding_plan.validation import check_can_be_split, has_ends
from titan_parallel.step.batch import Batch

_logger = logging.getLogger("titan_parallel")


def decide_sequence_parallel(
    model: nn.Module, roles: Roles, dims: ParallelDims, probe: ModelProbe | None
) -> ParallelDims:
    """Check that the model can be split over tensor ranks, and return `dims` with sequence parallel on or off.

    Raises ConfigError for a model that cannot be split, and where the config sets `sequence_parallel` to true for a
    model whose blocks mix tokens outside regions.
    """
    requested = dims.config.sequence_parallel
    if dims.tp_size == 1:
        return dims
    if requested is None and not has_ends(roles):
        dims = _without_sequence_parallel(dims, "the roles do not name an embedding, one stack of blocks and a head")
    check_can_be_split(model, roles, dims)
    if not dims.sequence_parallel or probe is None:
        return dims
    verdict = probe.sequence()
    if verdict.proved:
        return dims
    if requested is None:
        return _without_sequence_parallel(dims, verdict.reason)
    if verdict.proved is None:
        _warn("Cannot verify sequence_parallel=true: blocks may mix tokens outside regions (%s).", verdict.reason)
        return dims
    raise ConfigError(
        f"sequence_parallel must be false for blocks that mix tokens outside regions, got true: {verdict.reason}. Give "
        "that module the role region (and its projections the roles colwise and rowwise), or set sequence_parallel to "
        "false."
    )


class ContextCheck:
    """Checks that everything but attention is token-wise: at once, or else with the inputs of the first batch."""

    def __init__(self, probe: ModelProbe, dims: ParallelDims) -> None:
        self._degree = dims.cp_size
        self._probe: ModelProbe | None = probe
        self._apply(probe.context(), has_batch=False)

    def check_batch(self, batch: Batch) -> None:
        """Run the probe on the inputs of a batch, if the first check could not tell.

        Raises ConfigError for a model that mixes tokens outside its attention cores.
        """
        if self._probe is not None and not any(has_no_memory(tensor) for tensor in batch.inputs.values()):
            self._apply(self._probe.context(batch.inputs, batch.sequence_dims), has_batch=True)
            self._probe = None

    def _apply(self, verdict: Verdict, *, has_batch: bool) -> None:
        if verdict.proved is False:
            raise ConfigError(
                "context_parallel_degree must be 1 for a model that mixes tokens outside its attention cores, got "
                f"{self._degree}: {verdict.reason}. Set context_parallel_degree to 1."
            )
        if verdict.proved:
            self._probe = None
        elif has_batch:
            _warn(
                "Cannot verify context_parallel_degree > 1: the model may mix tokens outside attention (%s).",
                verdict.reason,
            )


class StageCheck:
    """Checks that pipeline blocks exchange only their hidden states; reports at the first batch.

    By then the first step's shape probe has run, whose message is more precise: it names the block that made an output
    and the module that reads it.
    """

    def __init__(self, probe: ModelProbe, cut: StageCut) -> None:
        self._cut = cut
        self._verdict: Verdict | None = probe.stages(cut)
        self._probe = probe if self._verdict.proved is None else None

    def check_batch(self, batch: Batch) -> None:
        """Run the probe on the inputs of a batch, if the first check could not tell.

        Raises ConfigError for blocks that exchange more than their hidden states.
        """
        verdict, self._verdict = self._verdict, None
        if self._probe is not None and not any(has_no_memory(tensor) for tensor in batch.inputs.values()):
            verdict, self._probe = self._probe.stages(self._cut, batch.inputs, batch.sequence_dims), None
        if verdict is None or verdict.proved:
            return
        if verdict.proved is None:
            _warn(
                "Cannot verify pipeline_parallel_degree > 1: blocks may exchange more than their hidden states (%s).",
                verdict.reason,
            )
            return
        raise ConfigError(
            "Pipeline blocks must exchange only their hidden states, got a stage that starts at "
            f"{verdict.reason}. Look for a tensor that an earlier block stores in an attribute, a container or a "
            "global, or set pipeline_parallel_degree to 1."
        )


def _without_sequence_parallel(dims: ParallelDims, reason: str) -> ParallelDims:
    _warn("sequence_parallel is off: %s. Set sequence_parallel to true or false to override.", reason)
    return dims.without_sequence_parallel()


def _warn(text: str, *values: object) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.warning(text, *values)
