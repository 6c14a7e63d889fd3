"""The training that a check runs, in one process and on every mesh: a few steps of one model on one batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn
from torch.nn import functional

from titan_parallel._transformers import is_transformers_model
from titan_parallel.check.model_roles import declared_roles
from titan_parallel.memory.activation_checkpoint import ActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.sharding_plan.roles import RoleTable
from titan_parallel.step.batch import Head, Loss
from titan_parallel.step.loss_unit import per_token
from titan_parallel.tensor_parallel.vocab_parallel_loss import cross_entropy
from titan_parallel.transforms import Transform

MAX_NORM = 0.1
"""Gradients are clipped to this norm, so that a wrong gradient norm changes the weights."""


@dataclass(frozen=True)
class Trial:
    """The arguments of `check_parallel` that do not depend on the mesh."""

    build: Callable[[], nn.Module]
    roles: RoleTable | None
    loss: Loss | None
    output: Callable[[Any], Tensor] | None
    dtype: torch.dtype
    steps: int
    num_microbatches: int
    activation_checkpoint: ActivationCheckpoint.Config | None
    compile: Compile.Config | None
    seed: int
    noise: float = 0.1
    """Standard deviation of the noise that is added to every weight."""
    extra_transforms: Sequence[Transform] = ()

    def model(self) -> nn.Module:
        """Build the model, with the same weights on each call, in eval mode (no dropout).

        Noise is added to every weight: norm weights of one and biases of zero would hide errors.
        """
        random.seed(self.seed)
        torch.manual_seed(self.seed)
        model = self.build().to(self.dtype).eval()
        if self.dtype is torch.float64 and is_transformers_model(model):
            model.set_experts_implementation("eager")  # type: ignore[operator]  # grouped_mm does not support float64
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(self.noise * torch.randn(parameter.shape, generator=generator, dtype=self.dtype))
                if not parameter.isfinite().all():
                    raise ConfigError(
                        f"build must return finite weights, got {name} with infinite or NaN values. Initialize the "
                        "model in build: for example, config.build() and then init_weights(0)."
                    )
        return model

    def roles_for(self, model: nn.Module) -> RoleTable:
        """Return the table that was given, or else that of the model."""
        return self.roles if self.roles is not None else declared_roles(model)

    def logits(self, output: Any) -> Tensor:
        """Return the logits in the output of the model."""
        if self.output is not None:
            return self.output(output)
        return output if isinstance(output, Tensor) else output.logits

    @property
    def parallel_loss(self) -> Loss:
        """The loss on a mesh."""
        return self.loss or _cross_entropy

    def plain_loss(self, logits: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss sum and count in one process: with torch's own cross-entropy where no loss was given."""
        if self.loss is not None:
            return self.loss(lambda hidden: hidden, logits, targets)
        labels = targets["labels"].flatten()
        return functional.cross_entropy(logits.flatten(0, -2), labels, reduction="sum"), (labels != -100).sum()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SGD with momentum: Adam would hide constant factors of gradients."""
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, foreach=False)


@per_token
def _cross_entropy(head: Head, hidden: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    return cross_entropy(head(hidden), targets["labels"]), (targets["labels"] != -100).sum()
