"""Hooks that the transforms of a model register for its training steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.statistics import StepStatistics


class SequenceSharding(Protocol):
    """Sharding of a batch, and of a loss over it, among the ranks that share its sequences."""

    def local_inputs(self, inputs: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the inputs of the model on this rank."""

    def local(self, tensors: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the tokens of this rank of tensors with a sequence dim, and other tensors unchanged."""

    def own_part(self, loss: Loss, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contribution of this rank to the sum and count of `loss`."""


@dataclass
class StepHooks:
    """Hooks of a training step around the forward and backward of the model.

    Transforms append to the lists when a model is parallelized; `ParallelModel` runs them in order.
    """

    batch_checks: list[Callable[[Batch, Loss], None]] = field(default_factory=list)
    """Called with each micro-batch before a step or an evaluation. A check that raises on one rank raises on all."""

    contexts: list[Callable[[], AbstractContextManager[None]]] = field(default_factory=list)
    """Entered around all code that runs the model: steps, evaluations, and shape probes."""

    backward_contexts: list[Callable[[float | Tensor], AbstractContextManager[None]]] = field(default_factory=list)
    """Entered around the forward and backward of a step, with the denominator of its gradients."""

    gradient_finalizers: list[Callable[[], None]] = field(default_factory=list)
    """Called after the backward of a step, when `.grad` holds sums over the mesh, before norm and clipping."""

    loss_checks: list[Callable[[Tensor, Loss], None]] = field(default_factory=list)
    """Called on every rank with the loss sum of that rank after a step or an evaluation."""

    sequence_sharding: SequenceSharding | None = None
    """None: each rank sees whole sequences."""

    statistics: StepStatistics | None = None
    """Per-step statistics of modules, such as tokens per expert. None: the model has no step counters."""

    nonlocal_parameters: Sequence[str] = ()
    """Names of the trained parameters that other ranks hold and this rank does not."""

    duplicate_parameters: Collection[str] = ()
    """Names of parameters that this rank holds and whose gradient another rank counts in the norm."""
