"""The reference run: the model in one process, on the whole batch, without any parallelism of this package."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.check.batch import CheckBatch
from titan_parallel.check.report import KINDS
from titan_parallel.check.tolerances import norm_of, roundings
from titan_parallel.check.trial import MAX_NORM, Trial
from titan_parallel.probe.float64 import computing_in
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.step.auxiliary_losses import AuxiliaryLosses
from titan_parallel.step.statistics import CountsPerStep


@dataclass(frozen=True)
class ReferenceRun:
    """The results of the single-process run. Weights and gradients are listed under every name of a parameter.

    Weights include the persistent buffers that the run changed. The reference of a trial in float32 is a run in float64
    from the same weights, with the rounding errors of runs in float32.
    """

    batch: dict[str, Any]
    denominator: float
    losses: dict[str, Tensor]
    """The mean loss of each step, and of an evaluation after the last step."""
    norms: dict[str, Tensor]
    """The norm of all gradients of each step, before clipping."""
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Gradients of the first step, before clipping; parameters without a gradient are missing."""
    weights: dict[str, Tensor]
    """Weights after the last step."""
    names: dict[str, str]
    """{each name of a parameter: its first name}, in the model's order."""
    rounding: dict[str, dict[str, float]]
    """{kind (losses, norms, gradients, weights): {quantity: rounding error in float32}}; empty in float64."""

    def save(self, path: Path) -> None:
        """Write the results to a file for the ranks."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> ReferenceRun:
        """Read the results from a file; tensors are memory-mapped."""
        return cls(**torch.load(path, mmap=True, weights_only=True))


_MAX_ROUNDING = 1e-3
"""The largest rounding error of all gradients, relative to their norm, with which errors can still be found."""


def run_reference(trial: Trial, batch: CheckBatch) -> ReferenceRun:
    """Train the model for a few steps in this process, on the whole batch at once."""
    if trial.dtype is torch.float64:
        return _run(trial, batch)
    exact = _run_in_float64(trial, batch)
    runs = [_run(trial, part) for part in (batch, batch.rolled(1), batch.rolled(batch.batch_size // 2))]
    rounding = {kind: roundings([getattr(run, kind) for run in runs], getattr(exact, kind)) for kind in KINDS}
    _require_small_rounding(rounding["gradients"], exact)
    return replace(exact, batch=asdict(batch), initial=runs[0].initial, rounding=rounding)


def _run_in_float64(trial: Trial, batch: CheckBatch) -> ReferenceRun:
    """Run the trial in float64 from the same weights."""
    with computing_in(trial.dtype):
        model = trial.model().double()
    try:
        in_float64 = replace(trial, build=lambda: model, noise=0.0, dtype=torch.float64)
        return _run(in_float64, batch.to(torch.float64))
    except Exception as error:
        error.add_note("(in the float64 run that is the reference for float32)")
        raise


def _require_small_rounding(rounding: dict[str, float], exact: ReferenceRun) -> None:
    """Raise ConfigError for a model whose gradients have too large a rounding error in float32."""
    share = math.hypot(*rounding.values()) / float(norm_of(exact.gradients.values()))
    if not share <= _MAX_ROUNDING:
        raise ConfigError(
            "dtype must be torch.float64 for this model, got torch.float32, whose rounding error is "
            f"{share:.1e} of the norm of its gradients in one process. That would hide errors on a mesh."
        )


def _run(trial: Trial, batch: CheckBatch) -> ReferenceRun:
    with computing_in(trial.dtype):
        model = trial.model()
        initial = _named(model, weights=True)
        buffers = {name: buffer.clone() for name, buffer in _state_buffers(model).items()}
        optimizer = trial.optimizer(model)
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        with torch.no_grad():
            denominator = float(trial.plain_loss(trial.logits(model(**batch.inputs)), batch.targets)[1])
        auxiliary_losses = AuxiliaryLosses(model, Roles(model, trial.roles_for(model)), tp_size=1, device_type="cpu")
        for step in range(1, trial.steps + 1):
            optimizer.zero_grad()
            with auxiliary_losses.divided_by(denominator):
                loss_sum, _ = trial.plain_loss(trial.logits(model(**batch.inputs)), batch.targets)
                (loss_sum / denominator).backward()
            gradients = gradients or _named(model, weights=False)
            norms[norm_of_step(step)] = _clip(model)
            losses[loss_of_step(step)] = loss_sum.detach().double() / denominator
            optimizer.step()
            _update_step_counters(model, trial)
        with torch.no_grad():
            loss_sum, _ = trial.plain_loss(trial.logits(model(**batch.inputs)), batch.targets)
        losses[LOSS_OF_EVALUATION] = loss_sum.double() / denominator
    first = {parameter: name for name, parameter in model.named_parameters()}
    names = {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    changed = {name: now for name, now in _state_buffers(model).items() if not torch.equal(now, buffers[name])}
    weights = _named(model, weights=True) | changed
    names |= {name: name for name in changed}
    return ReferenceRun(asdict(batch), denominator, losses, norms, initial, gradients, weights, names, rounding={})


def loss_of_step(step: int) -> str:
    """Return the name of the loss of a step, counted from 1."""
    return f"loss of step {step}"


def norm_of_step(step: int) -> str:
    """Return the name of the gradient norm of a step, counted from 1."""
    return f"gradient norm of step {step}"


LOSS_OF_EVALUATION = "loss of the evaluation"


def _named(model: nn.Module, weights: bool) -> dict[str, Tensor]:
    tensors = {n: p if weights else p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def _state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers that are in the state dict."""
    state = model.state_dict()
    return {name: state[name] for name, buffer in model.named_buffers() if name in state and buffer.is_floating_point()}


def _update_step_counters(model: nn.Module, trial: Trial) -> None:
    """Update modules with per-step statistics, as `after_step` does on a mesh."""
    for name in Roles(model, trial.roles_for(model)).named("step_counter"):
        module = cast(CountsPerStep, model.get_submodule(name))
        leaf = cast(Tensor, module.leaf)
        module.update(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        leaf.grad = None


def _clip(model: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = norm_of(gradients)
    for gradient in gradients:
        gradient.mul_(min(1.0, MAX_NORM / (float(norm) + 1e-6)))
    return norm
