"""Context parallel: the tokens of each sequence over ranks, which meet at the attention cores alone."""

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
from titan_parallel.context_parallel.ulysses import Ulysses, check_heads_divide
from titan_parallel.mesh.collectives import Axis
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.step.batch import Batch, BatchCheck, Loss
from titan_parallel.step.loss_unit import sequences_over, unit_of


class ContextParallel:
    """Gives each rank its tokens of a batch, and lets the attention cores see the keys of all.

    Cores share a sequence only while the engine runs a step (`sharing`): called directly, a model gets whole sequences.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims, check: Callable[[], BatchCheck]) -> None:
        """`check()` checks that tokens meet in the attention cores alone. Raises ConfigError where they do not."""
        self._dims = dims
        self.shards, self.method = _shards_and_method(dims)
        self.is_sharing = False
        self._interface = None
        cores = roles.named("attention")
        if not cores and is_transformers_model(model):
            self._interface = HuggingFaceAttention(model, self.shards, self.method)
        elif not cores:
            raise ConfigError(
                f"Got context_parallel_degree {dims.cp_size} and roles without an attention. Tokens of different "
                "ranks meet in the attention cores. Give the role attention to the modules that compute "
                "core(q, k, v, mask, scale), or set context_parallel_degree to 1."
            )
        if isinstance(self.method, Ulysses):
            _check_heads(roles, dims)
        self._check = check()
        self._build_mask, self._forward = _build_mask_with(self), _attend_with(self)
        for name in cores:
            self._share(name, model.get_submodule(name))

    @property
    def is_ring(self) -> bool:
        """Whether attention is computed again in the backward."""
        return isinstance(self.method, Ring)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """What runs herein sees this rank's part of each sequence."""
        self._turn(on=True)
        try:
            with sequences_over(self.shards.axis):
                yield
        finally:
            self._turn(on=False)

    def own_part(self, loss: Loss, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank adds to the loss's sum and count: of sequences, which all ranks counted, its share."""
        if unit_of(loss) == "token":
            return loss_sum, count
        axis = self.shards.axis
        return loss_sum / axis.size, count if axis.rank == 0 else torch.zeros_like(count)

    def check_shared(self, total: Tensor, loss: Loss) -> None:
        """Raise ValueError, on every rank of the mesh, where ranks that share sequences made different sums of them."""
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
        """What the model is called with on this rank."""
        return (self if self._interface is None else self._interface).local(inputs, sequence_dims)

    def local(self, tensors: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """This rank's tokens of the tensors that have a sequence; the others as they are."""
        return self.shards.local_tensors(tensors, sequence_dims)

    def check(self, batch: Batch, loss: Loss) -> None:
        """Raise ValueError, alike on every rank, for a batch whose sequences cannot be split, or a loss over them."""
        of_sequences = unit_of(loss) == "sequence"
        for kind, tensors in (("inputs", batch.inputs), ("targets", batch.targets)):
            if not (of_sequences and kind == "targets") and not any(name in batch.sequence_dims for name in tensors):
                raise ValueError(
                    f"Got a batch whose sequence_dims name none of its {kind} ({', '.join(tensors)}). Context parallel "
                    "gives each rank its tokens of them. Name those that have a sequence, with the dim that is it."
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
        why = f"Each rank has {'an early and a late part' if self.shards.balanced else 'one part'} of it, all as long"
        if dims.sequence_parallel:
            divisor = math.lcm(divisor, dims.cp_size * dims.tp_size)
            why += f", which sequence parallel splits over {dims.tp_size} tensor ranks"
        if length % divisor:
            raise ValueError(
                f"Got a sequence of {length} tokens over context_parallel_degree {dims.cp_size}. {why}. Make the "
                f"sequence length a multiple of {divisor}."
            )

    def _share(self, name: str, core: Any) -> None:
        """Let `core.build_mask` and `core.forward` go through the method; what they were stays within reach."""
        for needed in ("build_mask", "with_lse") if self.is_ring else ("build_mask",):
            if not callable(getattr(core, needed, None)):
                raise ConfigError(
                    f"Got the attention core {name}, a {type(core).__name__} without {needed}, under "
                    f"context_parallel_method {self._dims.config.context_parallel_method}. docs/parallel.md says what "
                    f"a core offers. Give it {needed}, or take another core or method."
                )
        core.whole_build_mask, core.whole_forward = core.build_mask, core.forward
        core.build_mask, core.forward = MethodType(self._build_mask, core), MethodType(self._forward, core)


def _build_mask_with(context: ContextParallel) -> Callable[..., Any]:
    """One function for all cores, so that what is compiled for one block serves all."""

    def build_mask(core: Any, mask: Any) -> Any:
        if not context.is_sharing:
            return core.whole_build_mask(mask)
        return context.method.build_mask(core.whole_build_mask, mask)

    return build_mask


def _attend_with(context: ContextParallel) -> Callable[..., Any]:
    def forward(
        core: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        if not context.is_sharing:
            output: Tensor = core.whole_forward(q, k, v, mask, scale, *(() if sinks is None else (sinks,)))
            return output
        kernel = AttentionKernel(
            output=lambda q, k, v, mask: core.whole_forward(q, k, v, mask, scale),
            output_and_lse=lambda q, k, v, mask: core.with_lse(q, k, v, mask, scale),
            sinks=sinks,
        )
        return context.method.attend(kernel, q, k, v, mask)

    return forward


def _check_heads(roles: Roles, dims: ParallelDims) -> None:
    """As far as the table tells: query heads are the most of a region."""
    for region in roles.named("region"):
        options = [roles.options(name) for name in roles.named("colwise") if roles.region_of(name) == region]
        counts = [its["num_heads"] for its in options if "num_heads" in its]
        if counts and max(counts) % dims.tp_size == 0:
            check_heads_divide(max(counts) // dims.tp_size, dims.cp_size)


def _shards_and_method(dims: ParallelDims) -> tuple[ContextShards, Method]:
    axis, config = Axis.of(dims.cp_mesh), dims.config
    if config.context_parallel_method == "ulysses":
        shards = ContextShards(axis, balanced=False)  # each rank computes on the whole sequence: nothing to balance
        return shards, Ulysses(shards)
    shards = ContextShards(axis, balanced=config.context_parallel_load_balance)
    if config.context_parallel_method == "ring":
        return shards, Ring(shards, dims.cp_mesh.get_group())
    return shards, Gather(shards)
