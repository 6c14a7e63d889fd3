"""Tensor and sequence parallel: how parameters are split, and what stands at the borders of regions."""

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
from titan_parallel.tensor_parallel.boundaries import bordered, entered, left, normed_over_all_heads, split_sequence
from titan_parallel.tensor_parallel.local_parameters import LocalView, Slot
from titan_parallel.tensor_parallel.local_sizes import set_local_sizes
from titan_parallel.tensor_parallel.partial_gradients import PartialGradients


class TensorParallel:
    """Splits a model over the tensor axis in place: parameters become DTensors, regions get their borders.

    Without sequence parallel every rank holds the whole residual stream: its gradients are summed where it enters a
    region, outputs where it leaves. With it a rank holds its part of the sequence from the first block to the last: the
    stream is gathered on entry of a region, and summed and split again on exit. Before and after the blocks it is
    whole, so that a model that counts tokens there (positions, masks, shapes) counts all of them.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
        self._model = model
        self._roles = roles
        self._dims = dims
        self._axis = Axis.of(dims.tp_mesh)
        self._units = [name for role in ("embedding", "block", "head") for name in roles.named(role)]
        self._takes = self._find_parts()
        names = self._find_partial(split=self._distribute_parameters())
        self.partial_gradients = PartialGradients(names, dims.tp_mesh.get_group())
        self._partial_slots = self._slots_of({model.get_parameter(name) for name in names})
        set_local_sizes(model, roles, dims.tp_size)
        self._put_borders()
        for name in roles.named("embedding"):
            self._split_embedding(name)

    def local_view(self, unit: str) -> LocalView:
        """The swap for the parameters of a block, an embedding or the head, or of what lies in none of these ("")."""
        modules = dict(self._model.named_modules())
        others = [other for other in self._units if other != unit]
        mine = [name for name in modules if inside(name, unit) or not unit]
        mine = [name for name in mine if not any(inside(name, other) for other in others)]
        return LocalView([modules[name] for name in mine], self._takes, self.partial_gradients, self._partial_slots)

    def head_forward(self, name: str) -> HeadForward:
        """The head's forward: the stream enters once; logits are split over the vocabulary, or gathered."""
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
            get(name).forward = bordered(get(name).forward, self._enter, self._leave)
        for name in roles.named("colwise"):
            if roles.options(name).get("border"):
                get(name).forward = entered(get(name).forward, self._enter)
        for name in roles.named("rowwise"):
            if roles.options(name).get("border"):
                get(name).forward = left(get(name).forward, self._leave)
        for name in roles.named("norm"):
            for features in side_by_side(get(name).get_parameter("weight").numel(), roles.options(name)):
                if features.heads is not None:
                    copies = features.copies(self._axis.size)
                    get(name).forward = normed_over_all_heads(get(name).forward, self._axis, copies)
        if self._dims.sequence_parallel:
            blocks = roles.named("block")
            split_sequence(get(blocks[0]), get(blocks[-1]), self._axis)

    def _find_parts(self) -> dict[Slot, Callable[[Tensor], Tensor]]:
        """What a rank takes of parameters that are stored whole: pieces that no one placement describes.

        Rows of projections side by side, of heads that several ranks take, and biases that one rank alone adds.
        """
        takes: dict[Slot, Callable[[Tensor], Tensor]] = {}
        for name in self._roles.named("colwise"):
            module, options = self._model.get_submodule(name), self._roles.options(name)
            dim = features_dim("colwise", options)
            projections = side_by_side(module.get_parameter("weight").size(dim), options)
            if len(projections) > 1 or projections[0].copies(self._axis.size) > 1:
                taken = parts(projections, self._axis.rank, self._axis.size)
                takes[module, "weight"] = functools.partial(_pieces, dim=dim, pieces=taken)
                takes[module, "bias"] = functools.partial(_pieces, dim=-1, pieces=taken)
        for name in self._roles.named("rowwise") if self._axis.rank else []:
            takes[self._model.get_submodule(name), "bias"] = lambda bias: bias * 0
        return takes

    def _find_partial(self, split: set[nn.Parameter]) -> list[str]:
        """The names of the parameters whose gradients are this rank's share of a sum over the tensor axis.

        Those held whole inside a region, where each rank computes on its own features, and under sequence parallel
        those in the stream too: in blocks each rank computes on its own tokens, before them it is given gradients of
        these, and after them gradients by its own part of the vocabulary.
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
        """Make every parameter a DTensor on the tensor axis; return those that are split."""
        split_dims = {slot: dim for slot, dim in self._split_dims().items() if slot not in self._takes}
        places: dict[nn.Parameter, list[Slot]] = {}  # more than one where it is tied
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
        """The dim in which the roles split a parameter; negative ones count from the end."""
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
        embedding.forward = _looked_up_in_part(look_up, start, stop, vocab_size, leave)


def _pieces(whole: Tensor, dim: int, pieces: list[tuple[int, int]]) -> Tensor:
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in pieces], dim)


def _looked_up_in_part(
    forward: Callable[..., Tensor], start: int, stop: int, vocab_size: int, leave: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """`forward` of an embedding that holds rows `start` to `stop`. Ids beyond the vocabulary fail on every rank."""

    def lookup(ids: Tensor) -> Tensor:
        mine = (ids >= start) & (ids < stop)
        beyond = (ids < 0) | (ids >= vocab_size)
        rows = torch.where(mine, ids - start, torch.where(beyond, vocab_size, 0))
        return leave(forward(rows).masked_fill(~mine.unsqueeze(-1), 0))

    return lookup
