"""A model on a mesh: forward, backward and gradient norm of a step, the same on one rank and on many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_parallel.memory.to_empty import to_empty
from titan_parallel.mesh.collectives import sequence_error
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck
from titan_parallel.step.batch import Batch, Loss, described
from titan_parallel.step.eval_mode import in_eval_mode
from titan_parallel.step.grad_norm import gradient_norm, scale_gradients_
from titan_parallel.step.gradient_accumulation import GradientHook, Schedule
from titan_parallel.step.hooks import StepHooks


class ParallelModel:
    """The result of `parallelize`. `model` is the module that was given; a direct call of it returns its own output.

    A backward in a custom training loop leaves gradients as DDP does: averaged over data ranks, and added to those
    that are there. Clip them with `clip_grad_norm_`; torch's function cannot mix meshes.
    """

    def __init__(self, model: nn.Module, dims: ParallelDims, schedule: Schedule, hooks: StepHooks) -> None:
        """`schedule` runs the micro-batches of a step, `hooks` are what transforms registered for steps."""
        self.model = model
        self.dims = dims
        self.schedule = schedule
        self._hooks = hooks
        self._gradient_hook: GradientHook | None = None
        self._ranks_of_dp_rank = dims.ranks_of_dp_rank

    @property
    def nonlocal_parameters(self) -> Sequence[str]:
        """The names of the trained parameters that other ranks hold and this rank does not."""
        return self._hooks.nonlocal_parameters

    def to_empty(self, device: torch.device | str) -> None:
        """Give a model on the meta device uninitialized memory on `device`; tied parameters and buffers stay tied."""
        to_empty(self.model, device)

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, denominator: float | Tensor) -> Tensor:
        """Set all gradients to those of loss sum / `denominator`, and return the loss sum.

        `batches` are all micro-batches of this data rank for the step, as many on every rank; `denominator` is one
        number for all of them, such as the count of valid targets over all data ranks. Gradients are summed over the
        mesh, never averaged. The loss sum is an fp64 scalar over the whole mesh, on every rank.
        """
        self._check_on_all_ranks(batches, loss, "forward_backward", self.schedule.check)
        self.model.zero_grad(set_to_none=True)
        if self._hooks.statistics is not None:
            self._hooks.statistics.reset()
        weighed = denominator / self._num_averaged
        with self._contexts(), self._backward_contexts(weighed):
            total = self.schedule.forward_backward(batches, loss, weighed)
        for finalize in self._hooks.gradient_finalizers:
            finalize()
        for check in self._hooks.loss_checks:
            check(total, loss)
        return self._sum_with_statistics(total)

    def after_step(self) -> dict[str, float]:
        """Update modules that count over a step, such as the expert bias of a router, and return their metrics.

        Call it after each optimizer step: modules act on the counts of all ranks. Metrics, such as `expert_load`, are
        the maximum over modules.
        """
        statistics = self._hooks.statistics
        if statistics is None:
            return {}
        if statistics.summed is None:  # a custom training loop called backward
            self._sum_with_statistics(torch.zeros((), dtype=torch.float64, device=self.dims.device_type))
        return statistics.update()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> tuple[Tensor, Tensor]:
        """Return loss sum (fp64) and count (int64) of these batches over the whole mesh, with the model in eval mode.

        Every data rank gives as many batches. Afterwards each module has the mode that it had before.
        """
        with in_eval_mode(self.model):
            self._check_on_all_ranks(batches, loss, "evaluate", lambda _: None)
            with self._contexts():
                totals = self.schedule.evaluate(batches, loss)
        for check in self._hooks.loss_checks:
            check(totals[0], loss)
        totals = self._sum_over_mesh(totals)
        return totals[0], totals[1].to(torch.int64)

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to the norm `max_norm` if their norm is larger; None or infinity only measures.

        Returns the norm before scaling: an fp64 scalar, the same on every rank.
        """
        parameters = dict(self.model.named_parameters())
        duplicates = self._hooks.duplicate_parameters
        counted = [parameter for name, parameter in parameters.items() if name not in duplicates]
        norm = gradient_norm(counted, self.dims.world_size, self.dims.device_type)
        if max_norm is not None and math.isfinite(max_norm):
            scale_gradients_(parameters.values(), norm, max_norm)
        return norm

    def set_gradient_hook(self, hook: GradientHook) -> None:
        """Call `hook(tensor)` on each gradient, or bucket of gradients, once it is summed over this mesh's data ranks.

        The hook runs during the backward of the last micro-batch, in the same order on every rank; also in earlier
        ones where these are reduced too (`fsdp_reduce_gradients` "always", without replicas on the mesh). It changes
        the tensor in place (a sum over replicas), and all later computation sees the changed tensor.
        """
        self._gradient_hook = hook
        self.schedule.set_gradient_hook(hook)

    def probe_shapes(self, batches: Sequence[Batch]) -> None:
        """Find the shapes that pipeline stages exchange for these batches, in the present mode of the modules."""
        with self._contexts():
            self.schedule.probe_shapes(batches)

    @contextmanager
    def _contexts(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self._hooks.contexts:
                stack.enter_context(context())
            yield

    @contextmanager
    def _backward_contexts(self, denominator: float | Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self._hooks.backward_contexts:
                stack.enter_context(context(denominator))
            yield

    def _sum_with_statistics(self, total: Tensor) -> Tensor:
        """Return the sum of `total` over the mesh; the same collective sums the statistics."""
        statistics = self._hooks.statistics
        if statistics is None:
            return self._sum_over_mesh(total)
        own_total = total if self._is_first_tensor_rank else torch.zeros_like(total)
        sums = torch.cat([own_total.reshape(1), statistics.local_counts()])
        if self.dims.world_size > 1:
            dist.all_reduce(sums)
        statistics.summed = sums[1:].contiguous()
        if self._gradient_hook is not None:
            self._gradient_hook(statistics.summed)
        return sums[0]

    def _sum_over_mesh(self, totals: Tensor) -> Tensor:
        """Sum over the ranks that saw other samples, tokens or stages; ranks of the tensor axis all have the same."""
        if self.dims.world_size > self.dims.tp_size:
            totals = totals if self._is_first_tensor_rank else torch.zeros_like(totals)
            dist.all_reduce(totals)
        return totals

    @property
    def _num_averaged(self) -> int:
        """The number of ranks over which FSDP averages gradients, which must be summed."""
        return self.dims.fsdp_mesh.size()

    @property
    def _is_first_tensor_rank(self) -> bool:
        return self.dims.mesh.get_local_rank("tp") == 0

    def _check_on_all_ranks(
        self, batches: Sequence[Batch], loss: Loss, call: str, check: Callable[[Sequence[Batch]], None]
    ) -> None:
        """Raise on every rank where the step of one rank cannot run, or differs from the step of another."""
        with RankConsistencyCheck(call, self.dims.device_type) as consistency:
            self._check(batches, loss)
            check(batches)
            consistency.on("numbers of batches", str(len(batches)))
            if len(self._ranks_of_dp_rank) > 1:
                lines = (f"number {index}: {described(batch)}" for index, batch in enumerate(batches))
                consistency.on("batches", "\n".join(lines), self._ranks_of_dp_rank)
            consistency.ask(self.schedule.must_probe(batches))
        if consistency.asked:
            self.probe_shapes(batches)

    def _check(self, batches: Sequence[Batch], loss: Loss) -> None:
        if not batches:
            raise ValueError("A step must have at least one batch on every data rank, got none.")
        for batch in batches:
            for check in self._hooks.batch_checks:
                check(batch, loss)
        if self.dims.sequence_parallel and self.dims.cp_size == 1:
            self._check_divides(batches)

    def _check_divides(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            for name, dim in batch.sequence_dims.items():
                if name in batch.inputs and batch.inputs[name].size(dim) % self.dims.tp_size:
                    raise ValueError(sequence_error(batch.inputs[name].size(dim), self.dims.tp_size))
