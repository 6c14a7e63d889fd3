"""Runs the stages of this rank on micro-batches by number, for schedules of any kind."""

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
    """Return the dtype of the loss sum of the last stage: at least fp32."""
    return torch.promote_types(stream[1], torch.float32)


class StageRunner(nn.Module):
    """A wrapper of the model as the FSDP root: its forward returns even where a stage stops the model's forward.

    The wrapper is outside of the module tree of the model, so that names of parameters do not change.
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
        """`stages` are by stage number. `probe` finds the shape of the hidden states of micro-batches of a new shape.
        `check` is called with the first micro-batch, for models that cannot be checked without a batch.

        `num_token_parts` is the number of ranks over which the first block shards the tokens of the hidden states.
        `dtype` is the dtype to which blocks cast hidden states (None: no cast).
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
        """`[loss sum, count]` in fp64 of each micro-batch whose last stage ran on this rank."""

    def begin(self, batches: Sequence[Batch], loss: Loss) -> list[Shape]:
        """Set the micro-batches of a step; return shape and dtype of the exchanged hidden states of each."""
        shapes = [self._shapes[self._layout(batch)] for batch in batches]
        local = map(self._loss_forward.local, batches)
        self._micro_batches = [(*tensors, shape) for tensors, shape in zip(local, shapes, strict=True)]
        self._loss, self.totals = loss, []
        return shapes

    def must_probe(self, batches: Sequence[Batch]) -> bool:
        """Return whether the hidden states of any of these batches have an unknown shape."""
        return any(self._layout(batch) not in self._shapes for batch in batches)

    def probe_shapes(self, batches: Sequence[Batch]) -> None:
        """Find the shapes of hidden states. Collective: ranks that know their shapes must call it, too.

        Raises ConfigError on every rank for a model that cannot be split into stages.
        """

        def probe() -> None:
            with RankConsistencyCheck("cut the model into stages", self._loss_forward.device_type):
                for batch in batches:
                    if self._layout(batch) not in self._shapes:
                        self._shapes[self._layout(batch)] = self._stream_shape(batch)
                self._check.check_batch(batches[0])

        try:
            with torch.no_grad():
                self(probe)  # all ranks gather the weights of the root before one can fail
        finally:
            self._free_weights()

    def run(self, stage: int, micro_batch: int, received: Tensor | None) -> Tensor:
        """Run the forward of a stage; return hidden states for the next stage, or the loss sum on the last stage."""
        inputs, self._targets, shape = self._micro_batches[micro_batch]
        output: Tensor = self(lambda: self._run(stage, received, inputs, shape))
        return output

    def end(self) -> Tensor:
        """Clear the micro-batches; return the sum of `totals` `[2]`, zeros on ranks without the last stage."""
        self._loss, self._micro_batches, self._targets = None, [], {}
        totals, self.totals = self.totals, []
        if not totals:
            return torch.zeros(2, dtype=torch.float64, device=self._loss_forward.device_type)
        return torch.stack(totals).sum(0)

    def forward(self, work: Callable[[], Any]) -> Any:
        """Call `work`, which runs the model, while the weights of the FSDP root are gathered."""
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
                    "Blocks of a pipeline must return hidden states of the shape and dtype of their input, "
                    f"{list(shape[0])} {shape[1]}, got {list(result.shape)} {result.dtype}. Set "
                    "pipeline_parallel_degree to 1."
                )
            return result.contiguous()
        self.totals.append(torch.stack([total.detach().to(torch.float64) for total in result]))
        return result[0].to(loss_dtype(shape))

    def _stream_shape(self, batch: Batch) -> Shape:
        """Return the shape and dtype of the hidden states that stages exchange for the micro-batch of one data rank."""
        inputs, targets = self._loss_forward.local(batch)
        size, dtype = self._probe.shape_of_stream(lambda: self._loss_forward.of(inputs, targets, self._probe.loss))
        tokens = size[-2] // self._num_token_parts
        as_cast = dtype if self._dtype is None or not dtype.is_floating_point else self._dtype
        return torch.Size([*size[:-2], tokens, size[-1]]), as_cast

    def _layout(self, batch: Batch) -> Hashable:
        """Return the cache key of a shape of hidden states; shapes of training and evaluation may differ."""
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
                "A pipelined model must be run by the ParallelModel that parallelize returned, got a direct call of "
                "its forward, while each rank holds only some stages. Call forward_backward or evaluate, or set "
                "pipeline_parallel_degree to 1."
            )


class _ContiguousGradient(torch.autograd.Function):
    """Identity with a contiguous gradient: point-to-point sends need contiguous memory."""

    @staticmethod
    def forward(ctx: Any, received: Tensor) -> Tensor:
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
