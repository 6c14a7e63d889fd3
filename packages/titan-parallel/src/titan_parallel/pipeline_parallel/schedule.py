"""Runs the micro-batches of a step through the stages of a pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from titan_parallel._torch.pipelining import Action, NumberedStage, reduce_gradients
from titan_parallel.pipeline_parallel.evaluation import forward_only
from titan_parallel.pipeline_parallel.partition import Stages
from titan_parallel.pipeline_parallel.shape_probe import Shape
from titan_parallel.pipeline_parallel.stage_runner import StageRunner, loss_dtype
from titan_parallel.pipeline_parallel.tied_weights import sum_over_holders
from titan_parallel.step.batch import Batch, Loss
from titan_parallel.step.gradient_accumulation import GradientHook

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Pipeline:
    """Forward and backward of all micro-batches in the order of a schedule; gradients are summed over ranks once."""

    def __init__(self, runner: StageRunner, stages: Stages, units: Sequence[FSDPModule]) -> None:
        """`runner` is the root FSDP module of the FSDP `units`."""
        self._runner = runner
        self._root: Any = runner
        self._stages = stages
        self._schedule = stages.schedule
        self._dims = stages.dims
        self._units = units
        self._denominator: float | Tensor = 1.0
        self._built: dict[tuple[int, Shape], Any] = {}

    def check(self, batches: Sequence[Batch]) -> None:
        _check_alike(batches)
        self._schedule.check_micro_batches(len(batches))

    def must_probe(self, batches: Sequence[Batch]) -> bool:
        return self._runner.must_probe(batches)

    def probe_shapes(self, batches: Sequence[Batch]) -> None:
        self._runner.probe_shapes(batches)

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, denominator: float | Tensor) -> Tensor:
        self._denominator = denominator
        shape = self._runner.begin(batches, loss)[0]
        self._root.set_requires_gradient_sync(False)
        self._root.set_is_last_backward(False)
        self._root.set_reshard_after_backward(self._dims.config.fsdp_reshard_after_forward == "always")
        numbers = torch.arange(len(batches))
        self._torch_schedule(len(batches), shape).step(target=numbers, return_outputs=False)
        reduce_gradients(self._root)
        sum_over_holders(self._runner.model, self._stages)
        return self._runner.end()[0]

    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> Tensor:
        shapes = self._runner.begin(batches, loss)
        forward_only(self._runner, self._stages, shapes)
        for unit in self._units:
            unit.reshard()  # a later optimizer step would make the gathered weights stale
        return self._runner.end()

    def set_gradient_hook(self, hook: GradientHook) -> None:
        for unit in self._units:
            unit.set_all_reduce_hook(hook)

    def orders(self, number: int) -> dict[int, list[Action | None]]:
        """Return the actions of each pipeline rank for `number` micro-batches of the shape of the last step."""
        *_, (_, shape) = self._built
        return dict(self._torch_schedule(number, shape).pipeline_order)

    @property
    def num_stages(self) -> int:
        """The number of stages on all ranks together."""
        return self._schedule.num_stages

    def blocks_of_ranks(self) -> list[list[range]]:
        """Return, for each rank of the pipeline, the block numbers of each of its stages."""
        return self._stages.blocks_of_ranks()

    def _torch_schedule(self, number: int, shape: Shape) -> Any:
        """Return the torch schedule for `number` micro-batches; it owns the receive buffers and is cached."""
        if (number, shape) not in self._built:
            stages = [self._torch_stage(stage, shape) for stage in self._stages.mine]
            self._built[number, shape] = self._schedule.build(stages, number, self._mean_loss)
        return self._built[number, shape]

    def _torch_stage(self, index: int, shape: Shape) -> PipelineStage:
        hidden = torch.empty(shape[0], dtype=shape[1], device="meta", requires_grad=True)
        loss = torch.empty((), dtype=loss_dtype(shape), device="meta", requires_grad=True)
        is_first, is_last = index == 0, index == self._schedule.num_stages - 1
        return NumberedStage(
            StageModule(self._runner, index),
            index,
            self._schedule.num_stages,
            torch.device(self._dims.device_type),
            input_args=() if is_first else (hidden,),
            output_args=(loss,) if is_last else (hidden,),
            group=self._dims.pp_mesh.get_group(),
            dw_builder=None if self._stages.splits_backward else _no_weight_backward,
        )

    def _mean_loss(self, loss_sum: Tensor, _micro_batch: Tensor) -> Tensor:
        return loss_sum / self._denominator


class StageModule(nn.Module):
    """A stage as torch sees it: a forward, and the parameters whose gradients a split backward computes."""

    def __init__(self, runner: StageRunner, index: int) -> None:
        super().__init__()
        self._run = runner.run
        self._index = index
        self.parameters: Callable[..., Any] = lambda: itertools.chain(runner.parameters(), _statistics(runner))
        self.micro_batch = 0

    def forward(self, received: Tensor | None = None) -> Tensor:
        return self._run(self._index, self.micro_batch, received)


def _statistics(runner: nn.Module) -> Iterator[Tensor]:
    """Return the buffers that accumulate per-step statistics as gradients."""
    return (buffer for buffer in runner.buffers() if buffer.requires_grad)


def _check_alike(batches: Sequence[Batch]) -> None:
    """Raise ValueError if micro-batches differ in shape or dtype; they share the receive buffers of the stages."""

    def layout(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in {**batch.inputs, **batch.targets}.items()}

    first = layout(batches[0])
    for number, batch in enumerate(batches[1:], start=2):
        other = layout(batch)
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"All micro-batches of a pipeline must have the same shapes and dtypes, got {name}: "
                    f"{_described(first.get(name))} in micro-batch 1 and {_described(other.get(name))} in micro-batch "
                    f"{number}. Pad the micro-batches to one shape, or set pipeline_parallel_degree to 1."
                )


def _described(layout: tuple[torch.Size, torch.dtype] | None) -> str:
    return "missing" if layout is None else f"shape {list(layout[0])} and dtype {layout[1]}"


def _no_weight_backward() -> Callable[..., None]:
    """Return a no-op weight backward: the gradients of weights are computed together with those of the inputs."""
    return lambda: None
