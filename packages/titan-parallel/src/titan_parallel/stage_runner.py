"""Runs this rank's stages on micro-batches, by number: what a schedule of any kind calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.batch import Batch, Loss
from titan_parallel.loss_forward import LossForward
from titan_parallel.stage_forward import StageForward

Shape = tuple[torch.Size, torch.dtype]


def loss_dtype(stream: Shape) -> torch.dtype:
    """What the last stage returns its loss sum in."""
    return torch.promote_types(stream[1], torch.float32)


class StageRunner(nn.Module):
    """Around the model, so that sharding has a root whose forward ends although the model's is cut short.

    It stands outside of the model's tree: no name changes.
    """

    def __init__(
        self, forward: LossForward, stages: Mapping[int, StageForward], probe: StageForward, num_token_parts: int
    ) -> None:
        """`stages` by number; `probe` stops before the first block and returns what that would get.

        `num_token_parts`: among how many ranks the first block splits the tokens of the stream.
        """
        super().__init__()
        self.model = forward.model
        self.model.register_forward_pre_hook(self._check_running)
        self._loss_forward = forward
        self._stages = stages
        self._probe = probe
        self._num_token_parts = num_token_parts
        self._running = False
        self._loss: Loss | None = None
        self._micro_batches: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self._targets: dict[str, Tensor] = {}
        self._shapes: dict[Any, Shape] = {}
        self.totals: list[Tensor] = []
        """[loss sum, count] of each micro-batch that this rank finished, fp64."""

    def begin(self, batches: Sequence[Batch], loss: Loss) -> list[Shape]:
        """Take the micro-batches of a step; the shape and dtype of the stream of each, as it goes between stages."""
        self._loss, self.totals = loss, []
        self._micro_batches = [self._loss_forward.local(batch) for batch in batches]
        return [self._stream_shape(inputs) for inputs, _ in self._micro_batches]

    def run(self, stage: int, micro_batch: int, received: Tensor | None) -> Tensor:
        """The stage's forward: the stream for the next stage, or the loss sum on the last."""
        inputs, self._targets = self._micro_batches[micro_batch]
        output: Tensor = self(stage, received, inputs)
        return output

    def end(self) -> Tensor:
        """The micro-batches are done; the sum of `totals`, zeros where the last stage is another's."""
        self._loss, self._micro_batches, self._targets = None, [], {}
        totals, self.totals = self.totals, []
        if not totals:
            return torch.zeros(2, dtype=torch.float64, device=self._loss_forward.device_type)
        return torch.stack(totals).sum(0)

    def forward(self, stage: int, received: Tensor | None, inputs: dict[str, Tensor]) -> Tensor:
        if received is not None:
            received = _ContiguousGradient.apply(received)
        result = self._cut_short(self._stages[stage], received, inputs)
        if isinstance(result, Tensor):
            shape = self._stream_shape(inputs)
            if (result.shape, result.dtype) != shape:
                raise RuntimeError(
                    f"Got a stream of shape {list(result.shape)} and {result.dtype} from a block, where the first "
                    f"block gets {list(shape[0])} and {shape[1]}. Stages of a pipeline exchange streams of one shape. "
                    "Set pipeline_parallel_degree to 1."
                )
            return result.contiguous()
        self.totals.append(torch.stack([total.detach().to(torch.float64) for total in result]))
        return result[0].to(loss_dtype(self._stream_shape(inputs)))

    def _cut_short(
        self, stage: StageForward, received: Tensor | None, inputs: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss = self._loss
        assert loss is not None
        self._running = True
        try:
            return stage(lambda: self._loss_forward.of(inputs, self._targets, loss), received)
        finally:
            self._running = False

    @torch.no_grad()
    def _stream_shape(self, inputs: dict[str, Tensor]) -> Shape:
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if key not in self._shapes:
            stream = self._cut_short(self._probe, None, inputs)
            assert isinstance(stream, Tensor)
            num_tokens = stream.size(-2) // self._num_token_parts
            self._shapes[key] = (torch.Size([*stream.shape[:-2], num_tokens, stream.size(-1)]), stream.dtype)
        return self._shapes[key]

    def _check_running(self, *_: Any) -> None:
        if not self._running:
            raise RuntimeError(
                "Got a direct call of a model of which each rank of the pipeline holds some stages. Its forward needs "
                "them all. Call forward_backward or evaluate of what parallelize returned, or set "
                "pipeline_parallel_degree to 1."
            )


class _ContiguousGradient(torch.autograd.Function):
    """Ranks send gradients as they lie in memory."""

    @staticmethod
    def forward(ctx: Any, received: Tensor) -> Tensor:
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
