"""The check on one rank of a mesh: run the same steps, and compare everything the rank holds with the reference."""

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
from titan_parallel.check.reference import LOSS_OF_EVALUATION, ReferenceRun, loss_of_step, norm_of_step
from titan_parallel.check.tolerances import Comparison, compare, norm_of
from titan_parallel.check.trial import MAX_NORM, Trial
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.parallelize import parallelize
from titan_parallel.probe.float64 import computing_in


@dataclass(frozen=True)
class RankResult:
    """The comparisons of one rank, by kind and name of a quantity; text says why a quantity cannot be compared.

    `weights` has every parameter that the rank holds.
    """

    gradients: dict[str, Comparison | str]
    norms: dict[str, Comparison | str]
    losses: dict[str, Comparison | str]
    weights: dict[str, Comparison | str]


def compare_on_rank(trial: Trial, config: ParallelDims.Config, num_ranks: int, reference: ReferenceRun) -> RankResult:
    """Run the trial on the mesh of `config`, of which this process is a rank, and compare it with `reference`."""
    with computing_in(trial.dtype):
        dims = config.build(world_size=num_ranks, device_type="cpu")
        model = trial.model()
        _require_equal(model, reference)
        parallel = parallelize(
            model,
            trial.roles_for(model),
            dims,
            activation_checkpoint=trial.activation_checkpoint,
            compile=trial.compile,
            output=trial.logits,
            extra_transforms=trial.extra_transforms,
        )
        with _AddModuleName(model):
            return _MeshRun(trial, parallel, reference).result()


class _MeshRun:
    def __init__(self, trial: Trial, parallel: ParallelModel, reference: ReferenceRun) -> None:
        self._trial, self._parallel, self._reference = trial, parallel, reference
        self._batches = _micro_batches(CheckBatch(**reference.batch), parallel.dims, trial.num_microbatches)

    def result(self) -> RankResult:
        parallel, reference, loss = self._parallel, self._reference, self._trial.parallel_loss
        optimizer = self._trial.optimizer(parallel.model)
        gradients: dict[str, Comparison | str] = {}
        norms: dict[str, Comparison | str] = {}
        losses: dict[str, Comparison | str] = {}
        for step in range(1, self._trial.steps + 1):
            loss_sum = parallel.forward_backward(self._batches, loss, reference.denominator)
            self._number(losses, "losses", loss_of_step(step), loss_sum / reference.denominator)
            if step == 1:
                named = parallel.model.named_parameters()
                gradients = self._tensors("gradients", {name: parameter.grad for name, parameter in named})
            self._number(norms, "norms", norm_of_step(step), parallel.clip_grad_norm_(MAX_NORM))
            optimizer.step()
            parallel.after_step()
        loss_sum, _ = parallel.evaluate(self._batches, loss)
        self._number(losses, "losses", LOSS_OF_EVALUATION, loss_sum / reference.denominator)
        return RankResult(gradients, norms, losses, self._tensors("weights", self._held()))

    def _held(self) -> dict[str, Tensor | None]:
        """Return the parameters that this rank holds, and the buffers that the reference run changed."""
        model = self._parallel.model
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in self._reference.weights}
        return {**dict(model.named_parameters()), **buffers}

    def _tensors(self, kind: str, here: Mapping[str, Tensor | None]) -> dict[str, Comparison | str]:
        """Compare the tensors that this rank holds, each by its first name here. A collective."""
        expected, names = getattr(self._reference, kind), self._reference.names
        norm_of_all = norm_of(tensor for name, tensor in expected.items() if names[name] == name)
        found: dict[str, Comparison | str] = {}
        for name, tensor in here.items():
            got = None if tensor is None else whole(tensor)
            if name not in names:
                found[name] = "a parameter that the model in one process does not have"
            elif got is None and name in expected:
                found[name] = "no gradient on the mesh, but one in one process"
            elif got is not None and name not in expected:
                found[name] = "a gradient on the mesh, but none in one process"
            elif got is not None and got.shape != expected[name].shape:
                found[name] = f"shape {list(got.shape)} on the mesh, {list(expected[name].shape)} in one process"
            elif got is not None and not got.isfinite().all():
                found[name] = "infinite or NaN values on the mesh"
            elif got is not None:
                found[name] = compare(got, expected[name], norm_of_all, self._rounding(kind, name))
        return found

    def _number(self, found: dict[str, Comparison | str], kind: str, name: str, got: Tensor) -> None:
        expected = getattr(self._reference, kind)[name]
        got = got.detach().cpu().to(self._trial.dtype)
        found[name] = compare(got, expected, expected.abs(), self._rounding(kind, name))

    def _rounding(self, kind: str, name: str) -> float | None:
        return self._reference.rounding[kind][name] if self._reference.rounding else None


def _micro_batches(batch: CheckBatch, dims: ParallelDims, num_microbatches: int) -> list[CheckBatch]:
    """Return the micro-batches of this data rank."""
    rank_size = batch.batch_size // dims.dp_size
    first, size = dims.dp_rank * rank_size, rank_size // num_microbatches
    return [batch.select(first + i * size, first + (i + 1) * size) for i in range(num_microbatches)]


def _require_equal(model: nn.Module, reference: ReferenceRun) -> None:
    for name, parameter in model.named_parameters():
        expected = reference.initial.get(name)
        if expected is None or not torch.equal(parameter, expected):
            raise ConfigError(
                f"build must return the same weights on every rank, got another value (or name) for {name} on this "
                "rank. The generators of torch and random are seeded before build: use them, or seed others in build."
            )


class _AddModuleName:
    """A context manager that adds to an error the name of the innermost module whose method raised it."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(trace)]
        names = [self._names[owner] for owner in owners if isinstance(owner, nn.Module) and self._names.get(owner)]
        if error is not None and names:
            error.add_note(f"(in {names[-1]})")
