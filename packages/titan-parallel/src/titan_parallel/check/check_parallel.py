"""Is a model on a mesh the same run as in one process? For anybody's model, on a few processes of a CPU."""

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

from titan_parallel.check.batch import CheckBatch, count_rows, make_up_batch
from titan_parallel.check.factor import sizes_of
from titan_parallel.check.forked import Failed, require_fork, run_alone, run_on_ranks
from titan_parallel.check.mesh_names import describe, ranks_of
from titan_parallel.check.on_mesh import Judgement, judge_on_rank
from titan_parallel.check.plain import ReferenceRun, run_plain
from titan_parallel.check.report import CheckReport, MeshReport
from titan_parallel.check.summary import failed, summarize
from titan_parallel.check.trial import Trial
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.mesh.parallel_dims import ParallelDims, shard_degree
from titan_parallel.sharding_plan.roles import Roles, RoleTable
from titan_parallel.step.batch import Batch, Loss


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
    world_size: int | None = None,
    seed: int = 0,
    timeout_s: float = 300,
) -> CheckReport:
    """Train a small model for a few steps in one process and on each mesh, and compare, on every rank.

    What is compared: every gradient of the first step before clipping, the gradient norm and the loss of each step, the
    loss of an evaluation, and the weights after the last step, by the rule of `titan_parallel.check.tolerances` for
    `dtype` (float64, or float32). In float64 what the model computes in float32 is lifted. In float32 the rule is ten
    times the rounding of the plain model, which is measured: the model has to run in float64 too.

    `build` makes a small model, small enough for a copy a rank, and is called in forked processes: closures are fine.
    `parallelism` is a mesh, or several by name. What is not given comes from the model: `roles` (`model.roles()`, or
    those of a Hugging Face model), the global `batch` (made up for models that read token ids), `loss` (cross-entropy
    of `targets["labels"]`), `output` (a tensor, or its `logits`), `world_size` (the product of the degrees).

    Raises ConfigError for arguments that do not fit the model or each other, RuntimeError where processes cannot be
    forked or the plain model fails. What fails on a mesh is in the report, which is also returned when nothing agrees.
    """
    require_fork()
    _require_settings(dtype, steps, num_microbatches)
    named = dict(parallelism) if isinstance(parallelism, Mapping) else {"mesh": parallelism}
    cases = [_Case(name, config, world_size or ranks_of(config)) for name, config in named.items()]
    options = (activation_checkpoint, compile, seed)
    trial = Trial(build, roles, loss, output, dtype, steps, num_microbatches, *options)
    shape = _shape(cases, num_microbatches)
    if batch is not None:
        _require_rows(count_rows(batch), shape[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reference.pt")

        def refer(_: str) -> None:
            model = trial.model()
            table = Roles(model, trial.roles_for(model))
            given = CheckBatch.of(batch) if batch is not None else make_up_batch(model, table, *shape, seed)
            run_plain(trial, given.to(dtype)).save(path)

        said = run_alone(refer, "the plain model", timeout_s)
        if isinstance(said, Failed):
            raise _error(said)
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
    def num_parts_of_sequence(self) -> int:
        """What a sequence is cut into: over tensor ranks, and over context ranks twice (its head and its tail)."""
        return 2 * self.config.tensor_parallel_degree * self.config.context_parallel_degree


def _report(trial: Trial, cases: Sequence[_Case], path: Path, timeout_s: float) -> CheckReport:
    """Start ranks once for each number of them."""
    record = ReferenceRun.load(path)
    by_name = {case.name: case for case in cases}
    outcomes: dict[str, list[Judgement] | Failed] = {}
    for num_ranks in sorted({case.num_ranks for case in cases}):
        names = [case.name for case in cases if case.num_ranks == num_ranks]

        def judge(name: str) -> Judgement:
            case = by_name[name]
            return judge_on_rank(trial, case.config, case.num_ranks, ReferenceRun.load(path))

        outcomes |= run_on_ranks(num_ranks, judge, names, timeout_s)
    return CheckReport({case.name: _mesh_report(case, outcomes[case.name], record, trial) for case in cases})


def _mesh_report(case: _Case, outcome: list[Judgement] | Failed, record: ReferenceRun, trial: Trial) -> MeshReport:
    degrees = describe(case.config)
    if isinstance(outcome, Failed):
        return failed(case.name, degrees, case.num_ranks, outcome)
    copies = case.num_ranks // case.config.pipeline_parallel_degree
    sizes = sizes_of(case.config, case.num_ranks, trial.num_microbatches)
    return summarize(case.name, degrees, outcome, record, copies, sizes)


def _shape(cases: Sequence[_Case], num_microbatches: int) -> tuple[int, int]:
    """Rows and tokens of a global batch that every mesh can divide; of a row, 16 tokens or some more."""
    rows = math.lcm(*(case.dp_size for case in cases)) * num_microbatches
    return rows, math.lcm(16, *(case.num_parts_of_sequence for case in cases))


def _require_settings(dtype: torch.dtype, steps: int, num_microbatches: int) -> None:
    if dtype not in (torch.float64, torch.float32):
        raise ConfigError(
            f"dtype must be torch.float64, in which nothing is close by chance, or torch.float32, got {dtype}."
        )
    for name, number in (("steps", steps), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ConfigError(f"Got {name} {number}. A check has some. Set {name} to 1 or more.")


def _require_rows(rows: int, multiple: int) -> None:
    if rows % multiple or not rows:
        raise ConfigError(
            f"Got a batch of {rows} rows. Each micro-batch of each data rank of each mesh has as many as any other. "
            f"Give a multiple of {multiple} rows, or fewer micro-batches."
        )


def _error(failed: Failed) -> Exception:
    if failed.kind == "ConfigError":
        return ConfigError(failed.message)
    return RuntimeError(
        f"Got a plain model that fails in one process: {failed.kind} {failed.message}. A mesh is compared with it. "
        f"Make it train on the batch first.\n{failed.trace}"
    )
