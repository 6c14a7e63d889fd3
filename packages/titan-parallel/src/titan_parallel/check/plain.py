"""The reference: the plain model in one process, with nothing of this package around it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from titan_parallel.check.batch import CheckBatch
from titan_parallel.check.lift import computing_in
from titan_parallel.check.trial import MAX_NORM, Trial
from titan_parallel.equality import norm_of
from titan_parallel.own_losses import OwnLosses
from titan_parallel.roles import Roles
from titan_parallel.tallies import Tallying


@dataclass(frozen=True)
class Record:
    """What a run of the plain model left; weights and gradients by every name that a parameter has.

    Buffers that are state, and that the run changed, are weights too.
    """

    batch: dict[str, Any]
    denominator: float
    losses: list[float]
    """The mean loss of each step, and one more after the last."""
    norms: list[float]
    """The norm of all gradients of each step, before clipping."""
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the first step, before clipping; those of parameters that get none are missing."""
    weights: dict[str, Tensor]
    """After the last step."""
    names: dict[str, str]
    """Every name that a parameter has -> the first of them, in the model's order."""

    def save(self, path: Path) -> None:
        """Write it for the ranks."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """As it was saved; tensors are read when they are needed."""
        return cls(**torch.load(path, mmap=True, weights_only=True))


def run_plain(trial: Trial, batch: CheckBatch) -> Record:
    """Train the plain model for a few steps on the whole batch at once."""
    with computing_in(trial.dtype):
        model = trial.model()
        initial = _named(model, weights=True)
        buffers = {name: buffer.clone() for name, buffer in _state_buffers(model).items()}
        optimizer = trial.optimizer(model)
        losses, norms, gradients = [], [], {}
        with torch.no_grad():
            denominator = float(trial.plain_loss(trial.logits(model(**batch.inputs)), batch.targets)[1])
        own_losses = OwnLosses(model, Roles(model, trial.roles_of(model)), num_tensor=1, device_type="cpu")
        for step in range(trial.steps):
            optimizer.zero_grad()
            with own_losses.divided_by(denominator):
                loss_sum, _ = trial.plain_loss(trial.logits(model(**batch.inputs)), batch.targets)
                (loss_sum / denominator).backward()
            if not step:
                gradients = _named(model, weights=False)
            norms.append(_clip(model))
            losses.append(float(loss_sum.detach()) / denominator)
            optimizer.step()
            _settle(model, trial)
        with torch.no_grad():
            loss_sum, _ = trial.plain_loss(trial.logits(model(**batch.inputs)), batch.targets)
        losses.append(float(loss_sum) / denominator)
    first = {parameter: name for name, parameter in model.named_parameters()}
    names = {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    changed = {name: now for name, now in _state_buffers(model).items() if not torch.equal(now, buffers[name])}
    weights = _named(model, weights=True) | changed
    names |= {name: name for name in changed}
    return Record(asdict(batch), denominator, losses, norms, initial, gradients, weights, names)


def _named(model: nn.Module, weights: bool) -> dict[str, Tensor]:
    tensors = {n: p if weights else p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def _state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are saved, numbers all of them."""
    state = model.state_dict()
    return {name: state[name] for name, buffer in model.named_buffers() if name in state and buffer.is_floating_point()}


def _settle(model: nn.Module, trial: Trial) -> None:
    """Let modules act on what they counted in a step, as `after_step` does on a mesh."""
    for name in Roles(model, trial.roles_of(model)).named("tally"):
        module = cast(Tallying, model.get_submodule(name))
        leaf = cast(Tensor, module.leaf)
        module.settle(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        leaf.grad = None


def _clip(model: nn.Module) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(norm_of(gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, MAX_NORM / (norm + 1e-6)))
    return norm
