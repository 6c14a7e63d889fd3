"""A model on a mesh: forward, backward and gradient norm of a step, alike on one rank and on many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel.batch import Batch, Loss
from titan_parallel.collectives import sequence_error
from titan_parallel.dims import ParallelDims
from titan_parallel.gradient_norm import gradient_norm, local, scale_gradients_
from titan_parallel.head import HeadForward

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class ParallelModel:
    """What `parallelize` returns. `model` is the module it was given; called directly it returns what it always did."""

    def __init__(
        self,
        model: nn.Module,
        dims: ParallelDims,
        *,
        head: HeadForward | None,
        units: Sequence[FSDPModule],
        partial_parameters: Sequence[str],
        output: Callable[[Any], Tensor] | None,
    ) -> None:
        self.model = model
        self.dims = dims
        self._head = head
        self._units = units
        self._partial_parameters = partial_parameters
        self._output = output or (lambda logits: logits)
        self._gradient_hook: Callable[[Tensor], None] | None = None

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, denominator: float | Tensor) -> Tensor:
        """Set all gradients to those of loss sum / `denominator`, and return the loss sum.

        `batches` are all micro-batches of this data rank for the step, as many on every rank; `denominator` is one
        number for all of them, such as the count of valid targets over all data ranks. Gradients are summed over the
        mesh, never averaged, and synchronised once. The loss sum is an fp64 scalar over the whole mesh, on every rank.
        """
        self._check(batches)
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.dims.device_type)
        for index, batch in enumerate(batches):
            with self._synchronised(index == len(batches) - 1):
                loss_sum, _ = self._loss(batch, loss)
                (loss_sum / denominator).backward()
            total += loss_sum.detach()
        self._sum_partial_gradients()
        if self.dims.num_data_ranks > 1:
            dist.all_reduce(total, group=self.dims.data_group)
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> tuple[Tensor, Tensor]:
        """Return loss sum (fp64) and count (int64) of these batches over the whole mesh, with the model in eval mode.

        Every data rank gives as many batches.
        """
        self._check(batches)
        totals = torch.zeros(2, dtype=torch.float64, device=self.dims.device_type)
        was_training = self.model.training
        self.model.eval()
        for batch in batches:
            totals += torch.stack([total.to(torch.float64) for total in self._loss(batch, loss)])
        self.model.train(was_training)
        for unit in self._units:
            unit.reshard()  # weights gathered here must not outlive a change of the weights
        if self.dims.num_data_ranks > 1:
            dist.all_reduce(totals, group=self.dims.data_group)
        return totals[0], totals[1].to(torch.int64)

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to the norm `max_norm` if theirs is larger; None or infinity only measures.

        Returns the norm before scaling: an fp64 scalar, the same on every rank.
        """
        parameters = list(self.model.parameters())
        norm = gradient_norm(parameters, self.dims.world_size, self.dims.device_type)
        if max_norm is not None and math.isfinite(max_norm):
            scale_gradients_(parameters, norm, max_norm)
        return norm

    def set_gradient_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Call `hook(tensor)` on each gradient, or bucket of gradients, once it is summed over this mesh's data ranks.

        It happens once a step, during the backward of the last micro-batch, in the same order on every rank. The hook
        changes the tensor in place (a sum over replicas), and everything after sees the changed one.
        """
        self._gradient_hook = hook
        for unit in self._units:
            unit.set_all_reduce_hook(hook)

    def _loss(self, batch: Batch, loss: Loss) -> tuple[Tensor, Tensor]:
        inputs, targets = self._on_device(batch.inputs), self._on_device(batch.targets)
        if self._head is None:
            return loss(lambda logits: logits, self._output(self.model(**inputs)), targets)
        with self._head.taking(loss, targets) as taken:
            output = self._output(self.model(**inputs))
        if taken.sum is None or taken.count is None or output is not taken.sum:
            raise ValueError(
                "Got a model whose output is not what its head returned. The head takes the loss, so nothing may come "
                "after it. Give the role head to the module whose output is the model's, or to none."
            )
        return taken.sum, taken.count

    def _on_device(self, tensors: Any) -> dict[str, Tensor]:
        return {name: tensor.to(self.dims.device_type, non_blocking=True) for name, tensor in tensors.items()}

    @contextmanager
    def _synchronised(self, is_last: bool) -> Iterator[None]:
        """Let the backward sum gradients over data ranks, and call the gradient hook, in the last micro-batch only."""
        for unit in self._units:
            unit.set_requires_gradient_sync(is_last, recurse=False)
        handles = []
        if is_last and self._gradient_hook is not None and not self._units:
            hook = self._gradient_hook
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(lambda p: hook(p.grad)))
        yield
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def _sum_partial_gradients(self) -> None:
        """One sum over the tensor axis of all gradients of which each rank has a share. (Sums over axes commute.)"""
        parameters = dict(self.model.named_parameters())
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name in self._partial_parameters:
            gradient = parameters[name].grad
            if gradient is not None:
                by_dtype.setdefault(gradient.dtype, []).append(local(gradient))
        for gradients in by_dtype.values():
            bucket = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(bucket, group=self.dims.tp_mesh.get_group())
            parts = bucket.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _check(self, batches: Sequence[Batch]) -> None:
        if not batches:
            raise ValueError(
                "Got no batches. A step has at least one on every rank. Give each data rank as many as the others."
            )
        if not self.dims.sequence_parallel:
            return
        for batch in batches:
            for name, dim in batch.sequence_dims.items():
                if name in batch.inputs and batch.inputs[name].size(dim) % self.dims.num_tensor:
                    raise ValueError(sequence_error(batch.inputs[name].size(dim), self.dims.num_tensor))
