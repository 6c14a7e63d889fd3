"""The reference: the plain model in one process, with nothing of this package around it."""

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
    """What a run of the plain model left; weights and gradients by every name that a parameter has.

    Buffers that are state, and that the run changed, are weights too. A trial in float32 is judged by a run in float64
    from the same weights, with the rounding of runs in float32.
    """

    batch: dict[str, Any]
    denominator: float
    losses: dict[str, Tensor]
    """The mean loss of each step, and of an evaluation after the last."""
    norms: dict[str, Tensor]
    """The norm of all gradients of each step, before clipping."""
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the first step, before clipping; those of parameters that get none are missing."""
    weights: dict[str, Tensor]
    """After the last step."""
    names: dict[str, str]
    """Every name that a parameter has -> the first of them, in the model's order."""
    rounding: dict[str, dict[str, float]]
    """For each kind (losses, norms, gradients, weights) that of each quantity in float32; empty in float64."""

    def save(self, path: Path) -> None:
        """Write it for the ranks."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> ReferenceRun:
        """As it was saved; tensors are read when they are needed."""
        return cls(**torch.load(path, mmap=True, weights_only=True))


_MOST_ROUNDING = 1e-3
"""Of all gradients: by a plain process that rounds more nothing can be judged."""


def run_plain(trial: Trial, batch: CheckBatch) -> ReferenceRun:
    """Train the plain model for a few steps on the whole batch at once."""
    if trial.dtype is torch.float64:
        return _run(trial, batch)
    exact = _run_in_float64(trial, batch)
    runs = [_run(trial, part) for part in (batch, batch.turned(1), batch.turned(batch.num_rows // 2))]
    rounding = {kind: roundings([getattr(run, kind) for run in runs], getattr(exact, kind)) for kind in KINDS}
    _require_small(rounding["gradients"], exact)
    return replace(exact, batch=asdict(batch), initial=runs[0].initial, rounding=rounding)


def _run_in_float64(trial: Trial, batch: CheckBatch) -> ReferenceRun:
    """Run the trial in float64 from the same weights."""
    with computing_in(trial.dtype):
        model = trial.model().double()
    try:
        in_float64 = replace(trial, build=lambda: model, noise=0.0, dtype=torch.float64)
        return _run(in_float64, batch.to(torch.float64))
    except Exception as error:
        error.add_note("(in float64, by which float32 is judged)")
        raise


def _require_small(rounding: dict[str, float], exact: ReferenceRun) -> None:
    """Raise ConfigError for a model that float32 does not compute."""
    share = math.hypot(*rounding.values()) / float(norm_of(exact.gradients.values()))
    if not share <= _MOST_ROUNDING:
        raise ConfigError(
            f"dtype must be torch.float64 for this model, got torch.float32. In one process float32 changes its "
            f"gradients by {share:.1e} of their norm, and a mesh cannot be told from that."
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
            _settle(model, trial)
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
    """The name of a loss, from step 1."""
    return f"loss of step {step}"


def norm_of_step(step: int) -> str:
    """The name of a norm, from step 1."""
    return f"gradient norm of step {step}"


LOSS_OF_EVALUATION = "loss of the evaluation"


def _named(model: nn.Module, weights: bool) -> dict[str, Tensor]:
    tensors = {n: p if weights else p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def _state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are saved, numbers all of them."""
    state = model.state_dict()
    return {name: state[name] for name, buffer in model.named_buffers() if name in state and buffer.is_floating_point()}


def _settle(model: nn.Module, trial: Trial) -> None:
    """Let modules act on what they counted in a step, as `after_step` does on a mesh."""
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
