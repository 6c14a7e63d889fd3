"""A model on a mesh: forward, backward and gradient norm of a step, alike on one rank and on many."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel.memory.to_empty import to_empty
from titan_parallel.mesh.collectives import sequence_error
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck
from titan_parallel.step.auxiliary_losses import AuxiliaryLosses
from titan_parallel.step.batch import Batch, Loss, described
from titan_parallel.step.eval_mode import in_eval_mode
from titan_parallel.step.grad_norm import gradient_norm, scale_gradients_
from titan_parallel.step.gradient_accumulation import GradientHook, Schedule
from titan_parallel.step.statistics import StepStatistics
from titan_parallel.tensor_parallel.partial_gradients import PartialGradients

if TYPE_CHECKING:
    from titan_parallel.context_parallel.apply import ContextParallel


class ParallelModel:
    """What `parallelize` returns. `model` is the module it was given; called directly it returns what it always did.

    A backward of one's own from there leaves gradients as DDP does: averaged over data ranks, and added to those that
    are there. Clip them with `clip_grad_norm_`, since torch's cannot mix meshes.
    """

    def __init__(
        self,
        model: nn.Module,
        dims: ParallelDims,
        *,
        schedule: Schedule,
        partial_gradients: PartialGradients | None,
        statistics: StepStatistics,
        auxiliary_losses: AuxiliaryLosses,
        context: ContextParallel | None = None,
        nonlocal_parameters: Sequence[str] = (),
        duplicate_parameters: Collection[str] = (),
    ) -> None:
        """`duplicate_parameters` are parameters that another rank holds too, and whose gradients it counts."""
        self.model = model
        self.dims = dims
        self.nonlocal_parameters = nonlocal_parameters
        """The parameters of the model that take gradients and that other ranks hold, not this one."""
        self._schedule = schedule
        self._partial_gradients = partial_gradients
        self._statistics = statistics
        self._auxiliary_losses = auxiliary_losses
        self._gradient_hook: GradientHook | None = None
        self._duplicate_parameters = duplicate_parameters
        self._ranks_of_data_rank = dims.ranks_of_dp_rank
        self._context = context

    def to_empty(self, device: torch.device | str) -> None:
        """Give a model on the meta device uninitialized memory on `device`; tied parameters and buffers stay tied."""
        to_empty(self.model, device)

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, denominator: float | Tensor) -> Tensor:
        """Set all gradients to those of loss sum / `denominator`, and return the loss sum.

        `batches` are all micro-batches of this data rank for the step, as many on every rank; `denominator` is one
        number for all of them, such as the count of valid targets over all data ranks. Gradients are summed over the
        mesh, never averaged. The loss sum is an fp64 scalar over the whole mesh, on every rank.
        """
        self._agree_on(batches, loss, "forward_backward", self._schedule.check)
        self.model.zero_grad(set_to_none=True)
        self._statistics.forget()
        weighed = denominator / self._num_averaged
        with (
            self._sharing_sequences(),
            self._partial_gradients_summed_at_the_end(),
            self._auxiliary_losses.divided_by(weighed),
        ):
            total = self._schedule.forward_backward(batches, loss, weighed)
        if self._context is not None:
            self._context.check_shared(total, loss)
        return self._sum_with_statistics(total)

    def after_step(self) -> dict[str, float]:
        """To call after each step of the optimizer: parts that count over a step act on what all ranks counted.

        That is how experts are balanced. Returns what these parts tell, such as `expert_load`; of several the highest.
        """
        if self._statistics.summed is None:  # a loop of somebody's own went backward
            self._sum_with_statistics(torch.zeros((), dtype=torch.float64, device=self.dims.device_type))
        return self._statistics.update()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> tuple[Tensor, Tensor]:
        """Return loss sum (fp64) and count (int64) of these batches over the whole mesh, with the model in eval mode.

        Every data rank gives as many batches. Each module is in the mode that it was in afterwards.
        """
        with in_eval_mode(self.model):
            self._agree_on(batches, loss, "evaluate", lambda _: None)
            with self._sharing_sequences():
                totals = self._schedule.evaluate(batches, loss)
        if self._context is not None:
            self._context.check_shared(totals[0], loss)
        totals = self._sum_over_mesh(totals)
        return totals[0], totals[1].to(torch.int64)

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to the norm `max_norm` if theirs is larger; None or infinity only measures.

        Returns the norm before scaling: an fp64 scalar, the same on every rank.
        """
        parameters = dict(self.model.named_parameters())
        counted = [parameter for name, parameter in parameters.items() if name not in self._duplicate_parameters]
        norm = gradient_norm(counted, self.dims.world_size, self.dims.device_type)
        if max_norm is not None and math.isfinite(max_norm):
            scale_gradients_(parameters.values(), norm, max_norm)
        return norm

    def set_gradient_hook(self, hook: GradientHook) -> None:
        """Call `hook(tensor)` on each gradient, or bucket of gradients, once it is summed over this mesh's data ranks.

        It happens during the backward of the last micro-batch, in the same order on every rank; also in those before
        where these are reduced too (`fsdp_reduce_gradients` "always", without replicas on the mesh). The hook changes
        the tensor in place (a sum over replicas), and everything after sees the changed one.
        """
        self._gradient_hook = hook
        self._schedule.set_gradient_hook(hook)

    def _probe_shapes(self, batches: Sequence[Batch]) -> None:
        """Learn what steps need to know of batches of these shapes, in the modes in which modules are."""
        with self._sharing_sequences():
            self._schedule.probe_shapes(batches)

    def _sharing_sequences(self) -> AbstractContextManager[None]:
        return nullcontext() if self._context is None else self._context.sharing()

    @property
    def schedule(self) -> Schedule:
        """How micro-batches run."""
        return self._schedule

    def _sum_with_statistics(self, total: Tensor) -> Tensor:
        """The sum of `total` over the mesh, and in the same go those of the statistics, which replicas sum further."""
        if not self._statistics.size:
            self._statistics.summed = total.new_zeros(0)
            return self._sum_over_mesh(total)
        own_total = total if self._is_first_tensor_rank else torch.zeros_like(total)
        sums = torch.cat([own_total.reshape(1), self._statistics.own()])
        if self.dims.world_size > 1:
            dist.all_reduce(sums)
        self._statistics.summed = sums[1:].contiguous()
        if self._gradient_hook is not None:
            self._gradient_hook(self._statistics.summed)
        return sums[0]

    def _sum_over_mesh(self, totals: Tensor) -> Tensor:
        """Over all ranks that saw other rows, tokens or stages; those of the tensor axis all have the same."""
        if self.dims.world_size > self.dims.tp_size:
            totals = totals if self._is_first_tensor_rank else torch.zeros_like(totals)
            dist.all_reduce(totals)
        return totals

    @property
    def _is_first_tensor_rank(self) -> bool:
        return self.dims.mesh.get_local_rank("tp") == 0

    @property
    def _num_averaged(self) -> int:
        """Over how many ranks FSDP averages gradients, which are to be summed."""
        return self.dims.fsdp_mesh.size()

    def _partial_gradients_summed_at_the_end(self) -> AbstractContextManager[None]:
        return (
            nullcontext() if self._partial_gradients is None else self._partial_gradients.summed_at_the_end(self.model)
        )

    def _agree_on(
        self, batches: Sequence[Batch], loss: Loss, doing: str, check: Callable[[Sequence[Batch]], None]
    ) -> None:
        """A step that one rank cannot do, or would do otherwise, is an error on every rank."""
        with RankConsistencyCheck(doing, self.dims.device_type) as consistency:
            self._check(batches, loss)
            check(batches)
            consistency.on("numbers of batches", str(len(batches)))
            if len(self._ranks_of_data_rank) > 1:
                lines = (f"number {index}: {described(batch)}" for index, batch in enumerate(batches))
                consistency.on("batches", "\n".join(lines), self._ranks_of_data_rank)
            consistency.ask(self._schedule.must_probe(batches))
        if consistency.asked:
            self._probe_shapes(batches)

    def _check(self, batches: Sequence[Batch], loss: Loss) -> None:
        if not batches:
            raise ValueError(
                "Got no batches. A step has at least one on every rank. Give each data rank as many as the others."
            )
        if self._context is not None:
            for batch in batches:
                self._context.check(batch, loss)
        elif self.dims.sequence_parallel:
            self._check_divides(batches)

    def _check_divides(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            for name, dim in batch.sequence_dims.items():
                if name in batch.inputs and batch.inputs[name].size(dim) % self.dims.tp_size:
                    raise ValueError(sequence_error(batch.inputs[name].size(dim), self.dims.tp_size))
