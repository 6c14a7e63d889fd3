"""Runs this rank's stages on micro-batches, by number: what a schedule of any kind calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.mesh.rank_consistency import RankConsistencyCheck
from titan_parallel.pipeline_parallel.shape_probe import Shape, StageProbe
from titan_parallel.pipeline_parallel.stage_forward import StageForward
from titan_parallel.step.batch import Batch, BatchCheck, Loss
from titan_parallel.step.forward_loss import LossForward


def loss_dtype(stream: Shape) -> torch.dtype:
    """What the last stage returns its loss sum in."""
    return torch.promote_types(stream[1], torch.float32)


class StageRunner(nn.Module):
    """Around the model, so that sharding has a root whose forward ends although the model's is cut short.

    It stands outside of the model's tree: no name changes.
    """

    def __init__(
        self,
        forward: LossForward,
        stages: Mapping[int, StageForward],
        probe: StageProbe,
        check: BatchCheck,
        *,
        num_token_parts: int,
        dtype: torch.dtype | None,
    ) -> None:
        """`stages` by number; `probe` finds the streams of micro-batches of a new shape, `check` is given the first
        of all, where the model could not be checked without one.

        `num_token_parts`: among how many ranks the first block splits the tokens of the stream. `dtype` is what blocks
        cast it to (None: they do not).
        """
        super().__init__()
        self.model = forward.model
        self.model.register_forward_pre_hook(self._check_running)
        self._loss_forward = forward
        self._stages = stages
        self._probe = probe
        self._check = check
        self._num_token_parts = num_token_parts
        self._dtype = dtype
        self._running = False
        self._loss: Loss | None = None
        self._micro_batches: list[tuple[dict[str, Tensor], dict[str, Tensor], Shape]] = []
        self._targets: dict[str, Tensor] = {}
        self._shapes: dict[Hashable, Shape] = {}
        self.totals: list[Tensor] = []
        """[loss sum, count] of each micro-batch that this rank finished, fp64."""

    def begin(self, batches: Sequence[Batch], loss: Loss) -> list[Shape]:
        """Take the micro-batches of a step; the shape and dtype of the stream of each, as it goes between stages."""
        shapes = [self._shapes[self._layout(batch)] for batch in batches]
        local = map(self._loss_forward.local, batches)
        self._micro_batches = [(*tensors, shape) for tensors, shape in zip(local, shapes, strict=True)]
        self._loss, self.totals = loss, []
        return shapes

    def must_probe(self, batches: Sequence[Batch]) -> bool:
        """Return whether the shape of any of these streams is not known yet."""
        return any(self._layout(batch) not in self._shapes for batch in batches)

    def probe_shapes(self, batches: Sequence[Batch]) -> None:
        """Find the shapes of streams; every rank calls it, also one that knows its own.

        Raises ConfigError on every rank for a model that cannot be cut.
        """

        def probe() -> None:
            with RankConsistencyCheck("cut the model into stages", self._loss_forward.device_type):
                for batch in batches:
                    if self._layout(batch) not in self._shapes:
                        self._shapes[self._layout(batch)] = self._stream_shape(batch)
                self._check.check_batch(batches[0])

        try:
            with torch.no_grad():
                self(probe)  # weights of the root are gathered by all ranks before any can fail
        finally:
            self._free_weights()

    def run(self, stage: int, micro_batch: int, received: Tensor | None) -> Tensor:
        """The stage's forward: the stream for the next stage, or the loss sum on the last."""
        inputs, self._targets, shape = self._micro_batches[micro_batch]
        output: Tensor = self(lambda: self._run(stage, received, inputs, shape))
        return output

    def end(self) -> Tensor:
        """The micro-batches are done; the sum of `totals`, zeros where the last stage is another's."""
        self._loss, self._micro_batches, self._targets = None, [], {}
        totals, self.totals = self.totals, []
        if not totals:
            return torch.zeros(2, dtype=torch.float64, device=self._loss_forward.device_type)
        return torch.stack(totals).sum(0)

    def forward(self, work: Callable[[], Any]) -> Any:
        """Run the model by `work`, with the weights of the root gathered."""
        self._running = True
        try:
            return work()
        finally:
            self._running = False

    def _run(self, stage: int, received: Tensor | None, inputs: dict[str, Tensor], shape: Shape) -> Tensor:
        loss, targets = self._loss, self._targets
        assert loss is not None
        if received is not None:
            received = _ContiguousGradient.apply(received)
        result = self._stages[stage](lambda: self._loss_forward.of(inputs, targets, loss), received)
        if isinstance(result, Tensor):
            if (result.shape, result.dtype) != shape:
                raise RuntimeError(
                    f"Blocks of a pipeline must return what they get in shape, {list(shape[0])} of {shape[1]}, got "
                    f"{list(result.shape)} of {result.dtype}. Set pipeline_parallel_degree to 1."
                )
            return result.contiguous()
        self.totals.append(torch.stack([total.detach().to(torch.float64) for total in result]))
        return result[0].to(loss_dtype(shape))

    def _stream_shape(self, batch: Batch) -> Shape:
        """As it goes between stages, of one data rank's micro-batch."""
        inputs, targets = self._loss_forward.local(batch)
        size, dtype = self._probe.shape_of_stream(lambda: self._loss_forward.of(inputs, targets, self._probe.loss))
        tokens = size[-2] // self._num_token_parts
        as_cast = dtype if self._dtype is None or not dtype.is_floating_point else self._dtype
        return torch.Size([*size[:-2], tokens, size[-1]]), as_cast

    def _layout(self, batch: Batch) -> Hashable:
        """What the shape of a stream depends on; a model may do other things when it evaluates."""
        inputs = ((name, tensor.shape, tensor.dtype) for name, tensor in batch.inputs.items())
        return (self.model.training, *inputs)

    def _free_weights(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for unit in self.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()

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
