"""From one micro-batch to its loss: what every schedule does with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.loss_in_head import HeadForward


class SequenceSharding(Protocol):
    """How ranks that share sequences take their part of a batch, and of a loss over it."""

    def local_inputs(self, inputs: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the inputs of the model on this rank."""

    def local(self, tensors: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return this rank's tokens of the tensors that have a sequence, the others unchanged."""

    def own_part(self, loss: Loss, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the loss's sum and count."""


class LossForward:
    """The model as a function of a micro-batch: its forward, with the loss taken in the head."""

    def __init__(
        self,
        model: nn.Module,
        device_type: str,
        *,
        head: HeadForward | None,
        output: Callable[[Any], Tensor] | None,
        context: SequenceSharding | None = None,
    ) -> None:
        self.model = model
        self.device_type = device_type
        self._head = head
        self._output = output or (lambda logits: logits)
        self._context = context

    def __call__(self, batch: Batch, loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss's (sum, count) over what this rank sees of `batch`."""
        inputs, targets = self.local(batch)
        return self.of(inputs, targets, loss)

    def local(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This rank's part of the inputs and the targets, on its device."""
        inputs, targets = batch.inputs, batch.targets
        if self._context is not None:
            inputs = self._context.local_inputs(inputs, batch.sequence_dims)
            targets = self._context.local(targets, batch.sequence_dims)
        return self._on_device(inputs), self._on_device(targets)

    def of(self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss's (sum, count) for what `local` returned; of what context ranks share, this rank's part."""
        loss_sum, count = self._of(inputs, targets, loss)
        return (loss_sum, count) if self._context is None else self._context.own_part(loss, loss_sum, count)

    def _of(self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
        if self._head is None:
            return loss(lambda logits: logits, self._output(self.model(**inputs)), targets)
        with self._head.taking(loss, targets) as taken:
            output = self._output(self.model(**inputs))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Got {type(output).__name__} from the model, expected a tensor of logits. Say which part of it they "
                "are: parallelize(..., output=operator.attrgetter('logits'))."
            )
        if taken.sum is None or taken.count is None or not _same_memory(output, taken.sum):
            raise ValueError(
                "Got a model whose output is not what its head returned. The head takes the loss, so nothing may come "
                "after it. Give the role head to the module whose output is the model's, or "
                '("head", {"takes_loss": False}) where something follows it.'
            )
        return output, taken.count

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device_type, non_blocking=True) for name, tensor in tensors.items()}


def _same_memory(output: Tensor, loss_sum: Tensor) -> bool:
    """Return whether `output` is `loss_sum`, or a view that a hook of somebody's (a profiler, a counter) made of it."""
    return output.untyped_storage()._cdata == loss_sum.untyped_storage()._cdata
