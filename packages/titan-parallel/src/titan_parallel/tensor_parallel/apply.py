"""Tensor and sequence parallelism: split parameters, and collectives at the borders of regions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from titan_parallel.mesh.collectives import Axis
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.sharding_plan.features import parts, side_by_side
from titan_parallel.sharding_plan.roles import Roles, inside
from titan_parallel.sharding_plan.validation import features_dim, one_split_dim
from titan_parallel.step.loss_in_head import HeadForward
from titan_parallel.tensor_parallel.boundaries import (
    split_sequence,
    wrap_input,
    wrap_norm_over_heads,
    wrap_output,
    wrap_region,
)
from titan_parallel.tensor_parallel.local_parameters import LocalView, Slot
from titan_parallel.tensor_parallel.local_sizes import set_local_sizes
from titan_parallel.tensor_parallel.partial_gradients import PartialGradients


class TensorParallel:
    """Splits a model over the tensor-parallel axis in place.

    Parameters become DTensors, and regions get collectives at their borders. Without sequence parallelism every rank
    holds the whole residual stream: outputs are summed (all-reduced) when they leave a region, and gradients where the
    stream enters it. With sequence parallelism a rank holds its chunk of the sequence from the first block to the last:
    the stream is all-gathered on entry of a region, and reduce-scattered on exit. Before and after the blocks the
    sequence is whole, so that code that counts tokens there (positions, masks, shapes) is correct as it is.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
        self._model = model
        self._roles = roles
        self._dims = dims
        self._axis = Axis.of(dims.tp_mesh)
        self._units = [name for role in ("embedding", "block", "unit", "head") for name in roles.named(role)]
        self._takes = self._find_slices()
        names = self._find_partial(split=self._distribute_parameters())
        self.partial_gradients = PartialGradients(names, dims.tp_mesh.get_group())
        self._partial_slots = self._slots_of({model.get_parameter(name) for name in names})
        set_local_sizes(model, roles, dims.tp_size)
        self._put_borders()
        for name in roles.named("embedding"):
            self._split_embedding(name)

    def local_view(self, unit: str) -> LocalView:
        """Return the local view for the parameters of a block, an embedding or the head; "" means all others."""
        modules = dict(self._model.named_modules())
        others = [other for other in self._units if other != unit]
        mine = [name for name in modules if inside(name, unit) or not unit]
        mine = [name for name in mine if not any(inside(name, other) for other in others)]
        return LocalView([modules[name] for name in mine], self._takes, self.partial_gradients, self._partial_slots)

    def head_forward(self, name: str) -> HeadForward:
        """Return the forward of the head, with logits that are sharded over the vocabulary or gathered."""
        head = self._model.get_submodule(name)
        vocab_size = len(head.get_parameter("weight"))
        project: Callable[[Tensor], Tensor] = self.local_view(name)(head.forward)

        def gathered(hidden: Tensor) -> Tensor:
            return self._axis.gather_vocabulary(project(hidden), vocab_size)

        def split(hidden: Tensor) -> Tensor:
            local = project(hidden)
            whole = torch.empty((*hidden.shape[:-1], vocab_size), device="meta")
            return DTensor.from_local(
                local,
                self._dims.tp_mesh,
                [Shard(local.dim() - 1)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )

        for_loss = split if self._dims.loss_parallel else gathered
        enter = None if self._dims.sequence_parallel else self._axis.copy
        return HeadForward(gathered, logits_for_loss=for_loss, enter=enter)

    def _put_borders(self) -> None:
        roles, get = self._roles, self._model.get_submodule
        for name in roles.named("region"):
            get(name).forward = wrap_region(get(name).forward, self._enter, self._leave, roles.streams_of(name))
        for name in roles.named("colwise"):
            if roles.options(name).get("border"):
                get(name).forward = wrap_input(get(name).forward, self._enter)
        for name in roles.named("rowwise"):
            if roles.options(name).get("border"):
                get(name).forward = wrap_output(get(name).forward, self._leave)
        for name in roles.named("norm"):
            for features in side_by_side(get(name).get_parameter("weight").numel(), roles.options(name)):
                if features.heads is not None:
                    copies = features.copies(self._axis.size)
                    get(name).forward = wrap_norm_over_heads(get(name).forward, self._axis, copies)
        if self._dims.sequence_parallel:
            blocks = roles.named("block")
            split_sequence(get(blocks[0]), get(blocks[-1]), self._axis)

    def _find_slices(self) -> dict[Slot, Callable[[Tensor], Tensor]]:
        """Return the functions that take this rank's slices of parameters that are stored whole.

        No DTensor placement describes these slices: packed projections, heads that several ranks take, and rowwise
        biases, which only rank 0 adds.
        """
        takes: dict[Slot, Callable[[Tensor], Tensor]] = {}
        for name in self._roles.named("colwise"):
            module, options = self._model.get_submodule(name), self._roles.options(name)
            dim = features_dim("colwise", options)
            projections = side_by_side(module.get_parameter("weight").size(dim), options)
            if len(projections) > 1 or projections[0].copies(self._axis.size) > 1:
                taken = parts(projections, self._axis.rank, self._axis.size)
                takes[module, "weight"] = functools.partial(_slices, dim=dim, slices=taken)
                takes[module, "bias"] = functools.partial(_slices, dim=-1, slices=taken)
        for name in self._roles.named("rowwise") if self._axis.rank else []:
            takes[self._model.get_submodule(name), "bias"] = lambda bias: bias * 0
        return takes

    def _find_partial(self, split: set[nn.Parameter]) -> list[str]:
        """Return the names of the parameters whose gradients must be summed over the tensor-parallel axis.

        These are the parameters held whole inside a region, where each rank computes with its own features. With
        sequence parallelism they are also those outside of regions: in blocks each rank computes on its own tokens;
        before the blocks it receives only the gradients of these tokens, and after them only the gradients from its
        own part of the vocabulary.
        """
        names = [name for role in ("region", "colwise", "rowwise") for name in self._roles.named(role)]
        regions = [self._model.get_submodule(name) for name in names]
        in_regions = {parameter for region in regions for parameter in region.parameters()}
        return [
            name
            for name, parameter in self._model.named_parameters()
            if parameter not in split and (self._dims.sequence_parallel or parameter in in_regions)
        ]

    def _enter(self, stream: Tensor) -> Tensor:
        return self._axis.gather_sequence(stream) if self._dims.sequence_parallel else self._axis.copy(stream)

    def _leave(self, partial: Tensor) -> Tensor:
        return self._axis.sum_scatter_sequence(partial) if self._dims.sequence_parallel else self._axis.sum(partial)

    def _sum_embeddings(self, partial: Tensor) -> Tensor:
        return self._axis.sum(partial, of_gradients=self._dims.sequence_parallel)

    def _slots_of(self, parameters: set[nn.Parameter]) -> set[Slot]:
        modules = self._model.modules()
        return {(module, name) for module in modules for name, p in module._parameters.items() if p in parameters}

    def _distribute_parameters(self) -> set[nn.Parameter]:
        """Make every parameter a DTensor on the tensor-parallel axis, and return the sharded ones."""
        split_dims = {slot: dim for slot, dim in self._split_dims().items() if slot not in self._takes}
        places: dict[nn.Parameter, list[Slot]] = {}  # several slots for a tied parameter
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((module, name))
        split: set[nn.Parameter] = set()
        for parameter, slots in places.items():
            split_dim = one_split_dim({split_dims.get(slot) for slot in slots}, slots[0][1], parameter)
            placement: Placement = Replicate() if split_dim is None else Shard(split_dim % parameter.dim())
            stored = distribute_tensor(parameter.data, self._dims.tp_mesh, [placement], src_data_rank=None)
            distributed = nn.Parameter(stored, requires_grad=parameter.requires_grad)
            for module, name in slots:
                module._parameters[name] = distributed
            if split_dim is not None:
                split.add(distributed)
        return split

    def _split_dims(self) -> dict[Slot, int]:
        """Return the dim along which the roles split each parameter; negative dims count from the end."""
        dims: dict[Slot, int] = {}
        for role in ("embedding", "colwise", "rowwise", "head"):
            for name in self._roles.named(role):
                module = self._model.get_submodule(name)
                dims[module, "weight"] = features_dim(role, self._roles.options(name))
                if role != "rowwise":
                    dims[module, "bias"] = -1
        for name in self._roles.named("per_head"):
            owner, _, parameter = name.rpartition(".")
            dims[self._model.get_submodule(owner), parameter] = 0
        return dims

    def _split_embedding(self, name: str) -> None:
        embedding = self._model.get_submodule(name)
        vocab_size = len(embedding.get_parameter("weight"))
        start, stop = self._axis.chunk(vocab_size)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            embedding.padding_idx = embedding.padding_idx - start if start <= embedding.padding_idx < stop else None
        look_up = self.local_view(name)(embedding.forward)
        leave = self._leave if self._roles.options(name).get("between_blocks") else self._sum_embeddings
        embedding.forward = _vocab_parallel_lookup(look_up, start, stop, vocab_size, leave)


def _slices(whole: Tensor, dim: int, slices: list[tuple[int, int]]) -> Tensor:
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in slices], dim)


def _vocab_parallel_lookup(
    forward: Callable[..., Tensor], start: int, stop: int, vocab_size: int, leave: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Wrap `forward` of an embedding that holds the rows `start` to `stop`: other ids give 0 before `leave` sums.

    Ids outside the vocabulary raise an error on every rank.
    """

    def lookup(ids: Tensor) -> Tensor:
        mine = (ids >= start) & (ids < stop)
        beyond = (ids < 0) | (ids >= vocab_size)
        rows = torch.where(mine, ids - start, torch.where(beyond, vocab_size, 0))
        return leave(forward(rows).masked_fill(~mine.unsqueeze(-1), 0))

    return lookup
