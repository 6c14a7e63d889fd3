"""How the micro-batches of a step run through a model whose stages are on several ranks."""

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
    """Forward and backward of all micro-batches in the order of a schedule, gradients summed over ranks at the end."""

    def __init__(self, runner: StageRunner, stages: Stages, units: Sequence[FSDPModule]) -> None:
        """`runner` is the root of the `units`."""
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
            unit.reshard()  # weights gathered here must not outlive a change of the weights
        return self._runner.end()

    def set_gradient_hook(self, hook: GradientHook) -> None:
        for unit in self._units:
            unit.set_all_reduce_hook(hook)

    def orders(self, number: int) -> dict[int, list[Action | None]]:
        """What each rank of the pipeline does with `number` micro-batches of the last step's shape."""
        *_, (_, shape) = self._built
        return dict(self._torch_schedule(number, shape).pipeline_order)

    @property
    def num_stages(self) -> int:
        """Those of all ranks."""
        return self._schedule.num_stages

    def blocks_of_ranks(self) -> list[list[range]]:
        """For each rank of the pipeline, the numbers of the blocks that its stages hold."""
        return self._stages.blocks_of_ranks()

    def _torch_schedule(self, number: int, shape: Shape) -> Any:
        """Torch's schedule for a number of micro-batches; it owns the buffers that receive them."""
        if (number, shape) not in self._built:
            stages = [self._torch_stage(stage, shape) for stage in self._stages.mine]
            self._built[number, shape] = self._schedule.build(stages, number, self._mean_loss)
        return self._built[number, shape]

    def _torch_stage(self, index: int, shape: Shape) -> PipelineStage:
        stream = torch.empty(shape[0], dtype=shape[1], device="meta", requires_grad=True)
        loss = torch.empty((), dtype=loss_dtype(shape), device="meta", requires_grad=True)
        is_first, is_last = index == 0, index == self._schedule.num_stages - 1
        return NumberedStage(
            StageModule(self._runner, index),
            index,
            self._schedule.num_stages,
            torch.device(self._dims.device_type),
            input_args=() if is_first else (stream,),
            output_args=(loss,) if is_last else (stream,),
            group=self._dims.pp_mesh.get_group(),
            dw_builder=None if self._stages.splits_backward else _weights_are_done,
        )

    def _mean_loss(self, loss_sum: Tensor, _micro_batch: Tensor) -> Tensor:
        return loss_sum / self._denominator


class StageModule(nn.Module):
    """What torch knows of a stage: a forward, and the parameters whose gradients it may ask for by themselves."""

    def __init__(self, runner: StageRunner, index: int) -> None:
        super().__init__()
        self._run = runner.run
        self._index = index
        self.parameters: Callable[..., Any] = lambda: itertools.chain(runner.parameters(), _statistics(runner))
        self.micro_batch = 0

    def forward(self, received: Tensor | None = None) -> Tensor:
        return self._run(self._index, self.micro_batch, received)


def _statistics(runner: nn.Module) -> Iterator[Tensor]:
    """What takes gradients besides the parameters: leaves in which modules count."""
    return (buffer for buffer in runner.buffers() if buffer.requires_grad)


def _check_alike(batches: Sequence[Batch]) -> None:
    """Raise ValueError where micro-batches differ in shape: buffers between stages are made once for all of them."""

    def layout(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in {**batch.inputs, **batch.targets}.items()}

    first = layout(batches[0])
    for number, batch in enumerate(batches[1:], start=2):
        other = layout(batch)
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"Got {name} of {_described(first.get(name))} in the first micro-batch and of "
                    f"{_described(other.get(name))} in number {number}. The stages of a pipeline exchange tensors of "
                    "one shape. Pad the batches to one shape, or set pipeline_parallel_degree to 1."
                )


def _described(layout: tuple[torch.Size, torch.dtype] | None) -> str:
    return "nothing" if layout is None else f"shape {list(layout[0])} and {layout[1]}"


def _weights_are_done() -> Callable[..., None]:
    """Torch's word for a stage whose weights get their gradients together with the inputs."""
    return lambda: None
