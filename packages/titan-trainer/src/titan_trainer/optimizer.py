"""Optimizers: how gradients become updates, with groups of parameters chosen by name."""

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
    """Which parameters get another learning rate or weight decay than the rest."""

    pattern: str
    """Of fully qualified parameter names; `*` stands for anything: `*norm*`, `embedding.*`."""
    lr_factor: float = 1.0
    """Times the optimizer's learning rate."""
    weight_decay: float | None = None
    """In place of the optimizer's. None: the optimizer's."""

    def validate(self) -> None:
        require_finite("parameter_groups.lr_factor", self.lr_factor)
        if self.weight_decay is not None:
            require_finite("parameter_groups.weight_decay", self.weight_decay)


class Optimizer(Configurable, ABC):
    """A torch optimizer over named parameters; its whole state exists from the start, under the parameters' names."""

    class Config(Configurable.Config):
        lr: float = 8e-4
        """Peak learning rate."""
        weight_decay: float = 0.1
        """Decoupled weight decay."""
        parameter_groups: list[ParameterGroup] = []
        """Exceptions, first match first."""

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
        """`nonlocal_parameters` are parameters of the model that other ranks have: patterns may be about these alone."""
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.optimizer = self.build_optimizer(group_parameters(self.parameters, config, nonlocal_parameters))
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = self.initial_state(parameter)

    @abstractmethod
    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer over these parameter groups."""

    @abstractmethod
    def initial_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of `parameter` before the first step."""

    def step(self, lr_factor: float) -> None:
        """Update the parameters at `lr_factor` times each group's peak learning rate, and drop the gradients."""
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak_lr * lr_factor
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> State:
        """`{parameter name: {state name: tensor}}`, the live tensors."""
        return {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: State) -> None:
        """Copy `state`, complete and of the same names, into the optimizer."""
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
        """How torch runs the update: one kernel for all parameters, one per operation, or a loop."""

        def validate(self) -> None:
            super().validate()
            require_finite("eps", self.eps)
            for name in ("beta1", "beta2"):
                if not 0 <= getattr(self, name) < 1:
                    raise ConfigError(
                        f"Got {name} {getattr(self, name)}. It is the share of the past in a running mean, from 0 to "
                        f"below 1. Set optimizer.{name} in that range."
                    )

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
        """torch's AdamW."""
        return torch.optim.AdamW(
            groups,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            fused=self.config.implementation == "fused",
            foreach=self.config.implementation == "foreach",
        )

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Zero moments, shaped and sharded like the parameter."""
        step_device = parameter.device if self.config.implementation == "fused" else "cpu"
        return {
            "step": torch.zeros((), dtype=torch.float32, device=step_device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


def require_finite(name: str, value: float) -> None:
    """Raise ConfigError unless the optimizer's setting is a finite number, 0 or more."""
    if not 0 <= value < math.inf:
        raise ConfigError(
            f"Got {name} {value}. It must be a finite number, not negative. Set optimizer.{name} to 0 or more."
        )


def group_parameters(
    parameters: dict[str, nn.Parameter], config: Optimizer.Config, nonlocal_parameters: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Torch's parameter groups: one per entry of `config.parameter_groups`, and one for all others.

    Raises ConfigError if a pattern matches no parameter, here or elsewhere, that an earlier one left.
    """
    groups = []
    remaining = dict(parameters)
    left_elsewhere = set(nonlocal_parameters)
    for exception in config.parameter_groups:
        names = [name for name in remaining if fnmatchcase(name, exception.pattern)]
        taken_elsewhere = {name for name in left_elsewhere if fnmatchcase(name, exception.pattern)}
        left_elsewhere -= taken_elsewhere
        if not names and taken_elsewhere:
            continue
        if not names:
            raise ConfigError(
                f"Got the parameter group {exception.pattern!r}, which matches no parameter. A group needs at least "
                "one that no earlier group took. Change optimizer.parameter_groups; the nearest name is "
                f"{nearest(exception.pattern, [*parameters, *nonlocal_parameters])}."
            )
        groups.append(
            {
                "params": [remaining.pop(name) for name in names],
                "lr": config.lr * exception.lr_factor,
                "weight_decay": config.weight_decay if exception.weight_decay is None else exception.weight_decay,
            }
        )
    if remaining:
        groups.append({"params": list(remaining.values()), "lr": config.lr, "weight_decay": config.weight_decay})
    return groups
