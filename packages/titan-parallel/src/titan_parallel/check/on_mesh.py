"""One rank's part of a check: the same steps on a mesh, and how far what it holds is from the reference."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.check.batch import CheckBatch
from titan_parallel.check.full_tensors import whole
from titan_parallel.check.plain import LOSS_OF_EVALUATION, ReferenceRun, loss_of_step, norm_of_step
from titan_parallel.check.tolerances import Comparison, compare, norm_of
from titan_parallel.check.trial import MAX_NORM, Trial
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.parallelize import parallelize
from titan_parallel.probe.float64 import computing_in


@dataclass(frozen=True)
class Judgement:
    """What one rank found: for each kind of quantity, by name, a comparison, or in words what cannot be compared.

    Weights are there for every parameter that the rank holds.
    """

    gradients: dict[str, Comparison | str]
    norms: dict[str, Comparison | str]
    losses: dict[str, Comparison | str]
    weights: dict[str, Comparison | str]


def judge_on_rank(trial: Trial, config: ParallelDims.Config, num_ranks: int, record: ReferenceRun) -> Judgement:
    """Run the trial on the mesh of `config`, of which this process is a rank."""
    with computing_in(trial.dtype):
        dims = config.build(world_size=num_ranks, device_type="cpu")
        model = trial.model()
        _require_equal(model, record)
        parallel = parallelize(
            model,
            trial.roles_for(model),
            dims,
            activation_checkpoint=trial.activation_checkpoint,
            compile=trial.compile,
            output=trial.logits,
        )
        with _TellingWhere(model):
            return _Judge(trial, parallel, record).judgement()


class _Judge:
    def __init__(self, trial: Trial, parallel: ParallelModel, record: ReferenceRun) -> None:
        self._trial, self._parallel, self._record = trial, parallel, record
        self._batches = _own_rows(CheckBatch(**record.batch), parallel.dims, trial.num_microbatches)

    def judgement(self) -> Judgement:
        parallel, record, loss = self._parallel, self._record, self._trial.parallel_loss
        optimizer = self._trial.optimizer(parallel.model)
        gradients: dict[str, Comparison | str] = {}
        norms: dict[str, Comparison | str] = {}
        losses: dict[str, Comparison | str] = {}
        for step in range(1, self._trial.steps + 1):
            loss_sum = parallel.forward_backward(self._batches, loss, record.denominator)
            self._number(losses, "losses", loss_of_step(step), loss_sum / record.denominator)
            if step == 1:
                named = parallel.model.named_parameters()
                gradients = self._tensors("gradients", {name: parameter.grad for name, parameter in named})
            self._number(norms, "norms", norm_of_step(step), parallel.clip_grad_norm_(MAX_NORM))
            optimizer.step()
            parallel.after_step()
        loss_sum, _ = parallel.evaluate(self._batches, loss)
        self._number(losses, "losses", LOSS_OF_EVALUATION, loss_sum / record.denominator)
        return Judgement(gradients, norms, losses, self._tensors("weights", self._held()))

    def _held(self) -> dict[str, Tensor | None]:
        """Parameters, and the buffers that the plain run changed, as far as this rank has them."""
        model = self._parallel.model
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in self._record.weights}
        return {**dict(model.named_parameters()), **buffers}

    def _tensors(self, kind: str, here: Mapping[str, Tensor | None]) -> dict[str, Comparison | str]:
        """Of everything that this rank holds, by the first of its names here; all ranks call this."""
        expected, names = getattr(self._record, kind), self._record.names
        norm_of_all = norm_of(tensor for name, tensor in expected.items() if names[name] == name)
        found: dict[str, Comparison | str] = {}
        for name, tensor in here.items():
            got = None if tensor is None else whole(tensor)
            if name not in names:
                found[name] = "a parameter that the plain model has not"
            elif got is None and name in expected:
                found[name] = "no gradient on the mesh, and one without"
            elif got is not None and name not in expected:
                found[name] = "a gradient on the mesh, and none without"
            elif got is not None and got.shape != expected[name].shape:
                found[name] = f"shape {list(got.shape)} on the mesh, {list(expected[name].shape)} without"
            elif got is not None and not got.isfinite().all():
                found[name] = "values on the mesh that are not finite"
            elif got is not None:
                found[name] = compare(got, expected[name], norm_of_all, self._rounding(kind, name))
        return found

    def _number(self, found: dict[str, Comparison | str], kind: str, name: str, got: Tensor) -> None:
        expected = getattr(self._record, kind)[name]
        got = got.detach().cpu().to(self._trial.dtype)
        found[name] = compare(got, expected, expected.abs(), self._rounding(kind, name))

    def _rounding(self, kind: str, name: str) -> float | None:
        return self._record.rounding[kind][name] if self._record.rounding else None


def _own_rows(batch: CheckBatch, dims: ParallelDims, num_microbatches: int) -> list[CheckBatch]:
    """This data rank's micro-batches."""
    rows = batch.num_rows // dims.dp_size
    first, step = dims.dp_rank * rows, rows // num_microbatches
    return [batch.rows(first + i * step, first + (i + 1) * step) for i in range(num_microbatches)]


def _require_equal(model: nn.Module, record: ReferenceRun) -> None:
    for name, parameter in model.named_parameters():
        expected = record.initial.get(name)
        if expected is None or not torch.equal(parameter, expected):
            raise ConfigError(
                f"Got a build that gave {name} another value, or name, on this rank. Every rank begins with the same "
                "weights; torch and random are seeded before build. Draw from these, or seed what you draw from."
            )


class _TellingWhere:
    """Adds to whatever is raised within the name of the innermost module in whose forward it was."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(trace)]
        names = [self._names[owner] for owner in owners if isinstance(owner, nn.Module) and self._names.get(owner)]
        if error is not None and names:
            error.add_note(f"(in {names[-1]})")
