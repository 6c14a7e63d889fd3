"""Apply the probe's verdict."""

from __future__ import annotations

import logging

import torch.distributed as dist
from titan_config import ConfigError
from torch import nn

from titan_parallel._torch.distributed import has_no_memory
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.pipeline_parallel.split_points import StageCut
from titan_parallel.probe.token_probe import TokenProbe
from titan_parallel.probe.verdict import Verdict
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.sharding_plan.validation import check_can_be_split, has_ends
from titan_parallel.step.batch import Batch

_logger = logging.getLogger("titan_parallel")


def probe_for(model: nn.Module, roles: Roles, dims: ParallelDims) -> TokenProbe | None:
    """Return a probe of the model, or None where `dims` splits neither sequences nor the stack of blocks."""
    splits_sequences = dims.cp_size > 1 or (dims.sequence_parallel and has_ends(roles))
    return TokenProbe(model, roles) if splits_sequences or dims.pp_size > 1 else None


def settle_tensor_parallel(
    model: nn.Module, roles: Roles, dims: ParallelDims, probe: TokenProbe | None
) -> ParallelDims:
    """Check that the model can be split over tensor ranks, and return `dims` with sequence parallel on or off.

    Raises ConfigError for a model that cannot be, and for sequence parallel that was asked for and would be wrong.
    """
    asked = dims.config.sequence_parallel
    if dims.tp_size == 1:
        return dims
    if asked is None and not has_ends(roles):
        dims = _turned_off(dims, "the roles do not name an embedding, one stack of blocks and a head")
    check_can_be_split(model, roles, dims)
    if not dims.sequence_parallel or probe is None:
        return dims
    verdict = probe.sequence()
    if verdict.proved:
        return dims
    if asked is None:
        return _turned_off(dims, verdict.why)
    if verdict.proved is None:
        _warn("sequence_parallel is on without proof that blocks are token-wise outside regions: %s", verdict.why)
        return dims
    raise ConfigError(
        f"sequence_parallel must be false for blocks that mix tokens outside regions, got true: {verdict.why}. Give "
        "that part the role region (with its colwise and rowwise parts), or set sequence_parallel to false."
    )


class ContextCheck:
    """Holds a probe until it has said that all but attention is token-wise: at once, or at the first batch."""

    def __init__(self, probe: TokenProbe, dims: ParallelDims) -> None:
        self._degree = dims.cp_size
        self._probe: TokenProbe | None = probe
        self._apply(probe.context(), has_batch=False)

    def check_batch(self, batch: Batch) -> None:
        """Ask the probe with the inputs of a batch, if it could not say. Raises ConfigError for a model that mixes."""
        if self._probe is not None and not any(has_no_memory(tensor) for tensor in batch.inputs.values()):
            self._apply(self._probe.context(batch.inputs, batch.sequence_dims), has_batch=True)
            self._probe = None

    def _apply(self, verdict: Verdict, *, has_batch: bool) -> None:
        if verdict.proved is False:
            raise ConfigError(
                "context_parallel_degree must be 1 for a model that mixes tokens outside its attention cores, got "
                f"{self._degree}: {verdict.why}. Set context_parallel_degree to 1."
            )
        if verdict.proved:
            self._probe = None
        elif has_batch:
            _warn("context_parallel_degree > 1 without proof that all but attention is token-wise: %s", verdict.why)


class StageCheck:
    """Asks a probe whether blocks exchange their stream alone, and says so at the first batch.

    By then the first step has said what it knows better: which output of which block is read where.
    """

    def __init__(self, probe: TokenProbe, cut: StageCut) -> None:
        self._cut = cut
        self._verdict: Verdict | None = probe.stages(cut)
        self._probe = probe if self._verdict.proved is None else None

    def check_batch(self, batch: Batch) -> None:
        """Raise ConfigError for blocks that exchange more; ask with the inputs of the batch, if there is no answer."""
        verdict, self._verdict = self._verdict, None
        if self._probe is not None and not any(has_no_memory(tensor) for tensor in batch.inputs.values()):
            verdict, self._probe = self._probe.stages(self._cut, batch.inputs, batch.sequence_dims), None
        if verdict is None or verdict.proved:
            return
        if verdict.proved is None:
            _warn("pipeline_parallel_degree > 1 without proof that blocks exchange their stream alone: %s", verdict.why)
            return
        raise ConfigError(
            "Blocks of a pipeline must exchange the stream alone, got a stage beginning with "
            f"{verdict.why}. Look for a tensor that an earlier block leaves in an attribute, a container or a "
            "global, or set pipeline_parallel_degree to 1."
        )


def _turned_off(dims: ParallelDims, why: str) -> ParallelDims:
    _warn("sequence_parallel is off: %s. Set it to true or false to decide yourself.", why)
    return dims.without_sequence_parallel()


def _warn(text: str, *values: object) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.warning(text, *values)
