"""Tensor and sequence parallel: how parameters are split, and what stands at the borders of regions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from titan_parallel.collectives import Axis
from titan_parallel.dims import ParallelDims
from titan_parallel.head import HeadForward
from titan_parallel.local_view import LocalView
from titan_parallel.roles import Roles, inside
from titan_parallel.tensor_parallel_checks import check_can_be_split, one_split_dim

SPLIT_WEIGHT_DIM = {"embedding": 0, "colwise": 0, "head": 0, "rowwise": 1}
"""role -> the dim of its matrix that is split; where it is 0 the bias is split too."""


class TensorParallel:
    """Splits a model over the tensor axis in place: parameters become DTensors, regions get their borders.

    Without sequence parallel every rank holds the whole residual stream: its gradients are summed where it enters a
    region, outputs where it leaves. With it a rank holds its part of the sequence: the stream is gathered on entry, and
    summed and split again on exit.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
        check_can_be_split(model, roles, dims)
        self._model = model
        self._roles = roles
        self._dims = dims
        self._axis = Axis.of(dims.tp_mesh)
        self._units = [name for role in ("embedding", "block", "head") for name in roles.named(role)]
        self.partial_parameters = self._find_partial(split=self._distribute_parameters())
        for name in roles.named("region"):
            region = model.get_submodule(name)
            region.forward = _bordered(region.forward, self._enter, self._leave)
        for name in roles.named("embedding"):
            self._split_embedding(name)

    def local_view(self, unit: str) -> LocalView:
        """The swap for the parameters of a block, an embedding or the head, or of what lies in none of these ("")."""
        modules = dict(self._model.named_modules())
        others = [other for other in self._units if other != unit]
        mine = [name for name in modules if inside(name, unit) or not unit]
        mine = [name for name in mine if not any(inside(name, other) for other in others)]
        rowwise = self._roles.named("rowwise") if self._axis.rank else []
        added_elsewhere = frozenset((self._model.get_submodule(name), "bias") for name in rowwise)
        return LocalView([modules[name] for name in mine], added_elsewhere)

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

        return HeadForward(gathered, logits_for_loss=split if self._dims.loss_parallel else gathered, enter=self._enter)

    def _find_partial(self, split: set[nn.Parameter]) -> list[str]:
        """The names of the parameters whose gradients are this rank's share of a sum over the tensor axis.

        Those held whole inside a region, where each rank computes on its own features, and under sequence parallel
        those in the stream, where each rank computes on its own tokens.
        """
        regions = [self._model.get_submodule(name) for name in self._roles.named("region")]
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

    def _distribute_parameters(self) -> set[nn.Parameter]:
        """Make every parameter a DTensor on the tensor axis; return those that are split."""
        split_dims = {
            (self._model.get_submodule(name), weight): dim
            for role, dim in SPLIT_WEIGHT_DIM.items()
            for name in self._roles.named(role)
            for weight in (("weight", "bias") if dim == 0 else ("weight",))
        }
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # more than one where it is tied
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((module, name))
        split: set[nn.Parameter] = set()
        for parameter, slots in places.items():
            split_dim = one_split_dim({split_dims.get(slot) for slot in slots}, slots[0][1], parameter)
            placement: Placement = Replicate() if split_dim is None else Shard(split_dim)
            stored = distribute_tensor(parameter.data, self._dims.tp_mesh, [placement], src_data_rank=None)
            distributed = nn.Parameter(stored, requires_grad=parameter.requires_grad)
            for module, name in slots:
                module._parameters[name] = distributed
            if split_dim is not None:
                split.add(distributed)
        return split

    def _split_embedding(self, name: str) -> None:
        embedding = self._model.get_submodule(name)
        vocab_size = len(embedding.get_parameter("weight"))
        start, stop = self._axis.chunk(vocab_size)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            embedding.padding_idx = embedding.padding_idx - start if start <= embedding.padding_idx < stop else None
        look_up = self.local_view(name)(embedding.forward)
        embedding.forward = _looked_up_in_part(look_up, start, stop, vocab_size, self._leave)


def _bordered(
    forward: Callable[..., Any], enter: Callable[[Tensor], Tensor], leave: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """`forward` of a region: the stream is its first argument, and its output or the first of them."""

    @functools.wraps(forward)
    def region_forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            output = forward(enter(args[0]), *args[1:], **kwargs)
        else:
            name = next(iter(kwargs))
            output = forward(**{**kwargs, name: enter(kwargs[name])})
        return (leave(output[0]), *output[1:]) if isinstance(output, tuple) else leave(output)

    return region_forward


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
