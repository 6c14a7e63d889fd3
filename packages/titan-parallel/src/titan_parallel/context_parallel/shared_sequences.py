"""Sequences whose tokens are on several ranks, which meet in the attention cores alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel._torch.distributed import has_no_memory
from titan_parallel._transformers import is_transformers_model
from titan_parallel.context_parallel.all_gather import Gather
from titan_parallel.context_parallel.attention_kernel import AttentionKernel, Method
from titan_parallel.context_parallel.ring import Ring
from titan_parallel.context_parallel.sequence_sharding import ContextShards
from titan_parallel.context_parallel.transformers_attention import HuggingFaceAttention
from titan_parallel.context_parallel.ulysses import Ulysses
from titan_parallel.mesh.collectives import Axis
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.step.batch import Batch, BatchCheck, Loss
from titan_parallel.step.loss_unit import sequences_over, unit_of


class SharedSequences:
    """Give each rank its tokens of a batch, and let the attention cores of a model see the keys of all ranks.

    Cores share a sequence only within `sharing`. A model that is called directly gets whole sequences.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims, check: Callable[[], BatchCheck]) -> None:
        """`check()` checks that tokens meet in the attention cores alone, or raises ConfigError."""
        self._dims = dims
        self.shards, self.method = _shards_and_method(dims)
        self.is_sharing = False
        self._interface = None
        cores = roles.named("attention")
        if not cores and is_transformers_model(model):
            self._interface = HuggingFaceAttention(model, self.shards, self.method)
        self._check = check()
        self._build_mask, self._forward = _build_mask_with(self), _attend_with(self)
        for name in cores:
            self._share(name, model.get_submodule(name))

    @property
    def is_ring(self) -> bool:
        """True for ring attention, which computes attention again in the backward."""
        return isinstance(self.method, Ring)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Run the model on this rank's part of each sequence within the context."""
        self._turn(on=True)
        try:
            with sequences_over(self.shards.axis):
                yield
        finally:
            self._turn(on=False)

    def own_part(self, loss: Loss, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's share of a loss's sum and count. All ranks of a sequence have a loss per sequence."""
        if unit_of(loss) == "token":
            return loss_sum, count
        axis = self.shards.axis
        return loss_sum / axis.size, count if axis.rank == 0 else torch.zeros_like(count)

    def check_loss(self, total: Tensor, loss: Loss) -> None:
        """Raise ValueError, on every rank of the mesh, where ranks that share a sequence differ in its loss."""
        if unit_of(loss) == "token" or has_no_memory(total):
            return
        ends = torch.stack([total, -total])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._dims.cp_mesh.get_group())
        highest, lowest = float(ends[0]), -float(ends[1])
        with RankConsistencyCheck("take the loss", self._dims.device_type):
            if highest - lowest > 1e-5 * max(abs(highest), abs(lowest)):
                size = self.shards.axis.size
                raise ValueError(
                    "A loss per sequence must be the same on all ranks that share the sequence, got "
                    f"{lowest * size:.6g} and {highest * size:.6g}. Sum what it makes of tokens with "
                    "titan_parallel.sum_over_sequence before anything that is not linear."
                )

    def local_inputs(self, inputs: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the inputs of the model on this rank."""
        return (self if self._interface is None else self._interface).local(inputs, sequence_dims)

    def local(self, tensors: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return this rank's tokens of the tensors that have a sequence dim, the others unchanged."""
        return self.shards.local_tensors(tensors, sequence_dims)

    def check(self, batch: Batch, loss: Loss) -> None:
        """Raise ValueError, alike on every rank, for a batch whose sequences cannot be split, or a loss over them."""
        of_sequences = unit_of(loss) == "sequence"
        for kind, tensors in (("inputs", batch.inputs), ("targets", batch.targets)):
            if not (of_sequences and kind == "targets") and not any(name in batch.sequence_dims for name in tensors):
                raise ValueError(
                    f"sequence_dims of a batch must name {kind} with a sequence dim under context parallelism, got "
                    f"none of {', '.join(tensors)}. Add each with its sequence dim."
                )
            for name, tensor in tensors.items():
                if name in batch.sequence_dims:
                    self._check_length(tensor.size(batch.sequence_dims[name]))
        self._check.check_batch(batch)

    def _turn(self, on: bool) -> None:
        self.is_sharing = on
        if self._interface is not None:
            self._interface.turn(on)

    def _check_length(self, length: int) -> None:
        dims, divisor = self._dims, self.shards.divisor
        parts = f"{'two equal parts' if self.shards.balanced else 'an equal part'} on each of {dims.cp_size} ranks"
        if dims.sequence_parallel:
            divisor = math.lcm(divisor, dims.cp_size * dims.tp_size)
            parts += f", split again over {dims.tp_size} tensor ranks by sequence parallelism"
        if length % divisor:
            raise ValueError(
                f"The sequence length must be a multiple of {divisor} under context_parallel_degree {dims.cp_size} "
                f"({parts}), got {length}."
            )

    def _share(self, name: str, core: Any) -> None:
        """Replace `build_mask` and `forward` of a core; the originals stay as `whole_build_mask`, `whole_forward`."""
        for needed in ("build_mask", "with_lse") if self.is_ring else ("build_mask",):
            if not callable(getattr(core, needed, None)):
                raise ConfigError(
                    f"An attention core under context_parallel_method {self._dims.config.context_parallel_method} must "
                    f"have {needed}, got {name}, a {type(core).__name__} without it. Add the method "
                    "(docs/concepts/context_parallel.md), or choose another core or context_parallel_method."
                )
        core.whole_build_mask, core.whole_forward = core.build_mask, core.forward
        core.build_mask, core.forward = MethodType(self._build_mask, core), MethodType(self._forward, core)


def _build_mask_with(shared: SharedSequences) -> Callable[..., Any]:
    """Return one function for all cores, so that all blocks share the code that is compiled for one."""

    def build_mask(core: Any, mask: Any) -> Any:
        if not shared.is_sharing:
            return core.whole_build_mask(mask)
        return shared.method.build_mask(core.whole_build_mask, mask)

    return build_mask


def _attend_with(shared: SharedSequences) -> Callable[..., Any]:
    def forward(
        core: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        if not shared.is_sharing:
            output: Tensor = core.whole_forward(q, k, v, mask, scale, *(() if sinks is None else (sinks,)))
            return output
        kernel = AttentionKernel(
            output=lambda q, k, v, mask: core.whole_forward(q, k, v, mask, scale),
            output_and_lse=lambda q, k, v, mask: core.with_lse(q, k, v, mask, scale),
            sinks=sinks,
        )
        return shared.method.attend(kernel, q, k, v, mask)

    return forward


def _shards_and_method(dims: ParallelDims) -> tuple[ContextShards, Method]:
    axis, config = Axis.of(dims.cp_mesh), dims.config
    if config.context_parallel_method == "ulysses":
        shards = ContextShards(axis, balanced=False)  # each rank computes on the whole sequence: nothing to balance
        return shards, Ulysses(shards)
    shards = ContextShards(axis, balanced=config.context_parallel_load_balance)
    if config.context_parallel_method == "ring":
        return shards, Ring(shards, dims.cp_mesh.get_group())
    return shards, Gather(shards)
