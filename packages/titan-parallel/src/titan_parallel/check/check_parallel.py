"""`check_parallel`: train a small model in one process and on meshes of CPU processes, and compare."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.check.batch import CheckBatch, batch_size_of, synthetic_batch
from titan_parallel.check.factor import sizes_of
from titan_parallel.check.forked import Failed, require_fork, run_alone, run_on_ranks
from titan_parallel.check.mesh_names import describe, ranks_of
from titan_parallel.check.on_mesh import RankResult, compare_on_rank
from titan_parallel.check.reference import ReferenceRun, run_reference
from titan_parallel.check.report import CheckReport, MeshReport
from titan_parallel.check.summary import failed, summarize
from titan_parallel.check.trial import Trial
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.mesh.parallel_dims import ParallelDims, shard_degree
from titan_parallel.sharding_plan.roles import Roles, RoleTable
from titan_parallel.step.batch import Batch, Loss
from titan_parallel.transforms import Transform


def check_parallel(
    build: Callable[[], nn.Module],
    parallelism: ParallelDims.Config | Mapping[str, ParallelDims.Config],
    *,
    roles: RoleTable | None = None,
    batch: Batch | None = None,
    loss: Loss | None = None,
    output: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    steps: int = 3,
    num_microbatches: int = 2,
    activation_checkpoint: ActivationCheckpoint.Config | None = None,
    compile: Compile.Config | None = None,
    extra_transforms: Sequence[Transform] = (),
    world_size: int | None = None,
    seed: int = 0,
    timeout_s: float = 300,
) -> CheckReport:
    """Train a small model for a few steps in one process and on each mesh, and compare the runs on every rank.

    It compares every gradient of the first step before clipping, the gradient norm and the loss of each step, the loss
    of an evaluation, and the weights after the last step. The tolerance is that of `titan_parallel.check.tolerances`
    for `dtype`. In float64, computations that the model makes in float32 are made in float64 too. In float32 the
    tolerance is ten times the measured rounding error of the single-process run, so the model must also run in float64.

    Raises ConfigError for arguments that do not fit the model or each other, and RuntimeError if processes cannot be
    forked or the single-process run fails. Failures on a mesh are in the report.

    Args:
        build: Return a small model, one copy of which fits in memory for each rank. Called in forked processes, so
            closures work.
        parallelism: A mesh, or several by name.
        roles: Table of roles. None: `model.roles()`, or the roles of a Hugging Face model.
        batch: The global batch. None: a synthetic one, for a model that takes token ids.
        loss: As for `forward_backward`. None: cross-entropy of `targets["labels"]`.
        output: Select the logits in the output of the model. None: the output itself, or its `logits`.
        dtype: torch.float64 or torch.float32.
        steps: Number of training steps.
        num_microbatches: Micro-batches of each data rank in a step.
        activation_checkpoint: As for `parallelize`.
        compile: As for `parallelize`.
        extra_transforms: As for `parallelize`; applied on the meshes, not in the single process.
        world_size: Number of ranks of each mesh. None: the product of its degrees.
        seed: Seed of the weights and of the synthetic batch.
        timeout_s: Seconds to wait for the ranks of a mesh.
    """
    require_fork()
    _require_settings(dtype, steps, num_microbatches)
    named = dict(parallelism) if isinstance(parallelism, Mapping) else {"mesh": parallelism}
    cases = [_Case(name, config, world_size or ranks_of(config)) for name, config in named.items()]
    options = (activation_checkpoint, compile, seed)
    trial = Trial(
        build, roles, loss, output, dtype, steps, num_microbatches, *options, extra_transforms=extra_transforms
    )
    shape = _shape(cases, num_microbatches)
    if batch is not None:
        _require_multiple(batch_size_of(batch), shape[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reference.pt")

        def run_and_save(_: str) -> None:
            model = trial.model()
            matched = Roles(model, trial.roles_for(model))
            given = CheckBatch.of(batch) if batch is not None else synthetic_batch(model, matched, *shape, seed)
            run_reference(trial, given.to(dtype)).save(path)

        outcome = run_alone(run_and_save, "reference", timeout_s)
        if isinstance(outcome, Failed):
            raise _error(outcome)
        return _report(trial, cases, path, timeout_s)


@dataclass(frozen=True)
class _Case:
    name: str
    config: ParallelDims.Config
    num_ranks: int

    @property
    def dp_size(self) -> int:
        return self.config.data_parallel_replicate_degree * shard_degree(self.config, self.num_ranks)

    @property
    def num_sequence_parts(self) -> int:
        """Parts of a sequence: one for each tensor rank, and two (head and tail) for each context rank."""
        return 2 * self.config.tensor_parallel_degree * self.config.context_parallel_degree


def _report(trial: Trial, cases: Sequence[_Case], path: Path, timeout_s: float) -> CheckReport:
    """Run all cases; ranks are started once for each number of ranks."""
    reference = ReferenceRun.load(path)
    by_name = {case.name: case for case in cases}
    outcomes: dict[str, list[RankResult] | Failed] = {}
    for num_ranks in sorted({case.num_ranks for case in cases}):
        names = [case.name for case in cases if case.num_ranks == num_ranks]

        def compare(name: str) -> RankResult:
            case = by_name[name]
            return compare_on_rank(trial, case.config, case.num_ranks, ReferenceRun.load(path))

        outcomes |= run_on_ranks(num_ranks, compare, names, timeout_s)
    return CheckReport({case.name: _mesh_report(case, outcomes[case.name], reference, trial) for case in cases})


def _mesh_report(case: _Case, outcome: list[RankResult] | Failed, reference: ReferenceRun, trial: Trial) -> MeshReport:
    degrees = describe(case.config)
    if isinstance(outcome, Failed):
        return failed(case.name, degrees, case.num_ranks, outcome)
    copies = case.num_ranks // case.config.pipeline_parallel_degree
    sizes = sizes_of(case.config, case.num_ranks, trial.num_microbatches)
    return summarize(case.name, degrees, outcome, reference, copies, sizes)


def _shape(cases: Sequence[_Case], num_microbatches: int) -> tuple[int, int]:
    """Return batch size and sequence length (16 or more) of a global batch that every mesh divides."""
    batch_size = math.lcm(*(case.dp_size for case in cases)) * num_microbatches
    return batch_size, math.lcm(16, *(case.num_sequence_parts for case in cases))


def _require_settings(dtype: torch.dtype, steps: int, num_microbatches: int) -> None:
    if dtype not in (torch.float64, torch.float32):
        raise ConfigError(f"dtype must be torch.float64 or torch.float32, got {dtype}.")
    for name, number in (("steps", steps), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}.")


def _require_multiple(batch_size: int, multiple: int) -> None:
    if batch_size % multiple or not batch_size:
        raise ConfigError(
            f"The batch size must be a multiple of {multiple} (num_microbatches x the data ranks of every mesh), got "
            f"{batch_size}. Change the batch or num_microbatches."
        )


def _error(failed: Failed) -> Exception:
    if failed.kind == "ConfigError":
        return ConfigError(failed.message)
    return RuntimeError(
        f"The model must train on the batch in one process, got {failed.kind}: {failed.message}\n{failed.trace}"
    )
