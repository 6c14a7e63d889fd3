"""The loss of one micro-batch: forward of the model, and the loss in its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.hooks import SequenceSharding
from titan_parallel.step.loss_in_head import HeadForward


class LossForward:
    """A model as a function of a micro-batch that returns the sum of a loss, and the number of its targets.

    The head computes the loss, where the model has a head that may: see `HeadForward`.
    """

    def __init__(
        self,
        model: nn.Module,
        device_type: str,
        *,
        head: HeadForward | None,
        output: Callable[[Any], Tensor] | None,
        sequence_sharding: SequenceSharding | None = None,
    ) -> None:
        self.model = model
        self.device_type = device_type
        self._head = head
        self._output = output or (lambda logits: logits)
        self._sharding = sequence_sharding

    def __call__(self, batch: Batch, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return the loss's `(sum, count)` over this rank's part of `batch`, two scalars."""
        inputs, targets = self.local(batch)
        return self.of(inputs, targets, loss)

    def local(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return this rank's part of the inputs and of the targets, on its device."""
        inputs, targets = batch.inputs, batch.targets
        if self._sharding is not None:
            inputs = self._sharding.local_inputs(inputs, batch.sequence_dims)
            targets = self._sharding.local(targets, batch.sequence_dims)
        return self._on_device(inputs), self._on_device(targets)

    def of(self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
        """Return the loss's `(sum, count)` for the result of `local`: this rank's share of shared sequences."""
        loss_sum, count = self._of(inputs, targets, loss)
        return (loss_sum, count) if self._sharding is None else self._sharding.own_part(loss, loss_sum, count)

    def _of(self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
        if self._head is None:
            return loss(lambda logits: logits, self._output(self.model(**inputs)), targets)
        with self._head.taking(loss, targets) as taken:
            output = self._output(self.model(**inputs))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"The output of the model must be a tensor of logits, got {type(output).__name__}. Select the logits: "
                "parallelize(..., output=operator.attrgetter('logits'))."
            )
        if taken.sum is None or taken.count is None or not _same_memory(output, taken.sum):
            raise ValueError(
                "The output of the model must be what its head returned, since the head computes the loss; got another "
                "tensor. Give the role head to the last module of the model, or the role "
                '("head", {"takes_loss": False}) where other operations follow the head.'
            )
        return output, taken.count

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device_type, non_blocking=True) for name, tensor in tensors.items()}


def _same_memory(output: Tensor, loss_sum: Tensor) -> bool:
    """Return whether `output` is `loss_sum`, or a view of it that a third-party hook (a profiler, a counter) made."""
    return output.untyped_storage()._cdata == loss_sum.untyped_storage()._cdata
