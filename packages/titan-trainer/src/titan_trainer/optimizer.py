"""Optimizers, with parameter groups chosen by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from titan_config import ConfigError, Configurable
from torch import nn

from titan_trainer.errors import nearest
from titan_trainer.protocols import State


class ParameterGroup(Configurable.Config):
    """Learning rate and weight decay of the parameters whose names match a pattern."""

    pattern: str
    """Pattern of fully qualified parameter names; `*` matches any characters: `*norm*`, `embedding.*`."""
    lr_factor: float = 1.0
    """Factor of the optimizer's learning rate for this group."""
    weight_decay: float | None = None
    """Weight decay of this group. None: the optimizer's."""

    def validate(self) -> None:
        require_finite("parameter_groups.lr_factor", self.lr_factor)
        if self.weight_decay is not None:
            require_finite("parameter_groups.weight_decay", self.weight_decay)


class Optimizer(Configurable, ABC):
    """A torch optimizer over named parameters; its full state exists from the start, keyed by parameter name."""

    class Config(Configurable.Config):
        lr: float = 8e-4
        """Peak learning rate."""
        weight_decay: float = 0.1
        """Decoupled weight decay."""
        parameter_groups: list[ParameterGroup] = []
        """Groups with another learning rate or weight decay. A parameter belongs to the first group that matches."""

        def validate(self) -> None:
            for name in ("lr", "weight_decay"):
                require_finite(name, getattr(self, name))

    def __init__(
        self,
        config: Config,
        *,
        parameters: Iterable[tuple[str, nn.Parameter]],
        nonlocal_parameters: Collection[str] = (),
    ) -> None:
        """Build the torch optimizer and its state.

        `nonlocal_parameters` are names of parameters that only other ranks hold; a pattern may match these alone.
        """
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.optimizer = self.build_optimizer(group_parameters(self.parameters, config, nonlocal_parameters))
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = self.initial_state(parameter)

    @abstractmethod
    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the torch optimizer over these parameter groups."""

    @abstractmethod
    def initial_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer state of `parameter` before the first step."""

    def step(self, lr_factor: float) -> None:
        """Update the parameters with `lr_factor` times each group's peak learning rate, and free the gradients."""
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak_lr * lr_factor
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> State:
        """Return `{parameter name: {state name: tensor}}` with the live tensors."""
        return {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: State) -> None:
        """Copy `state`, which must have every name, into the optimizer."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state[parameter].items():
                    value.copy_(state[name][key])


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

    class Config(Optimizer.Config):
        beta1: float = 0.9
        beta2: float = 0.95
        eps: float = 1e-8
        implementation: Literal["for-loop", "foreach", "fused"] = "fused"
        """Kernels of the update: a loop over parameters, one kernel per operation (foreach), or one in all (fused)."""

        def validate(self) -> None:
            super().validate()
            require_finite("eps", self.eps)
            for name in ("beta1", "beta2"):
                if not 0 <= getattr(self, name) < 1:
                    raise ConfigError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(self, name)}.")

    def __init__(
        self,
        config: Config,
        *,
        parameters: Iterable[tuple[str, nn.Parameter]],
        nonlocal_parameters: Collection[str] = (),
    ) -> None:
        self.config = config
        super().__init__(config, parameters=parameters, nonlocal_parameters=nonlocal_parameters)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return `torch.optim.AdamW` over `groups`."""
        return torch.optim.AdamW(
            groups,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            fused=self.config.implementation == "fused",
            foreach=self.config.implementation == "foreach",
        )

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return a step counter of 0 and zero moments, shaped and sharded like the parameter."""
        step_device = parameter.device if self.config.implementation == "fused" else "cpu"
        return {
            "step": torch.zeros((), dtype=torch.float32, device=step_device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


def require_finite(name: str, value: float) -> None:
    """Raise ConfigError unless `value`, that of the setting optimizer.`name`, is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"optimizer.{name} must be finite and at least 0, got {value}.")


def group_parameters(
    parameters: dict[str, nn.Parameter], config: Optimizer.Config, nonlocal_parameters: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return torch's parameter groups: one per entry of `config.parameter_groups`, and one for all other parameters.

    Raises ConfigError if a pattern matches no parameter, local or nonlocal, that earlier patterns have not matched.
    """
    groups = []
    remaining = dict(parameters)
    remaining_nonlocal = set(nonlocal_parameters)
    for group in config.parameter_groups:
        names = [name for name in remaining if fnmatchcase(name, group.pattern)]
        nonlocal_names = {name for name in remaining_nonlocal if fnmatchcase(name, group.pattern)}
        remaining_nonlocal -= nonlocal_names
        if not names and nonlocal_names:
            continue
        if not names:
            raise ConfigError(
                "optimizer.parameter_groups must each match a parameter that no earlier group matches, got pattern "
                f"{group.pattern!r}. The closest name is "
                f"{nearest(group.pattern, [*parameters, *nonlocal_parameters])}."
            )
        groups.append(
            {
                "params": [remaining.pop(name) for name in names],
                "lr": config.lr * group.lr_factor,
                "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
            }
        )
    if remaining:
        groups.append({"params": list(remaining.values()), "lr": config.lr, "weight_decay": config.weight_decay})
    return groups
