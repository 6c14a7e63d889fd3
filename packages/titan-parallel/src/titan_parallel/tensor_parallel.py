"""Tensor and sequence parallel: how parameters are split, and what stands at the borders of regions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from titan_parallel.collectives import Axis
from titan_parallel.dims import ParallelDims, one_of
from titan_parallel.head import HeadForward
from titan_parallel.local_view import LocalView
from titan_parallel.roles import Roles, inside


class TensorParallel:
    """Splits a model over the tensor axis in place: parameters become DTensors, regions get their borders.

    Without sequence parallel every rank holds the whole residual stream: gradients are summed where it enters a region, outputs
    where it leaves. With it a rank holds its part of the sequence: the stream is gathered on entry, summed and split on exit.
    """

    def __init__(self, model: nn.Module, roles: Roles, dims: ParallelDims) -> None:
        self._model = model
        self._roles = roles
        self._dims = dims
        self._axis = Axis.of(dims.tp_mesh)
        self._check()
        self._split_dims = self._find_split_dims()
        self._distribute_parameters()
        self._units = [name for role in ("embedding", "block", "head") for name in roles.named(role)]
        for region in roles.named("region"):
            module = model.get_submodule(region)
            module.forward = _bordered(module.forward, self._enter, self._leave)
        for embedding in roles.named("embedding"):
            self._split_embedding(embedding)

    # -- What the stream meets at a border -------------------------------------------------------------------------------

    def _enter(self, stream: Tensor) -> Tensor:
        return self._axis.gather_sequence(stream) if self._dims.sequence_parallel else self._axis.copy(stream)

    def _leave(self, partial: Tensor) -> Tensor:
        return self._axis.sum_scatter_sequence(partial) if self._dims.sequence_parallel else self._axis.sum(partial)

    def head_forward(self, name: str) -> HeadForward:
        """The head's forward: the stream enters once, logits are made of local weights, split or gathered over the vocabulary."""
        head = self._model.get_submodule(name)
        vocab_size = head.weight.size(0)
        project = self.local_view(name)(head.forward)

        def gathered(hidden: Tensor) -> Tensor:
            return self._axis.gather_vocabulary(project(hidden), vocab_size)

        def split(hidden: Tensor) -> Tensor:
            local = project(hidden)
            shape = torch.Size([*hidden.shape[:-1], vocab_size])
            stride = torch.empty(shape, device="meta").stride()
            placements = [Shard(local.dim() - 1)]
            return DTensor.from_local(local, self._dims.tp_mesh, placements, run_check=False, shape=shape, stride=stride)

        return HeadForward(gathered, logits_for_loss=split if self._dims.loss_parallel else gathered, enter=self._enter)

    # -- Parameters ------------------------------------------------------------------------------------------------------

    def local_view(self, unit: str) -> LocalView:
        """The swap for the parameters of a block, an embedding or the head, or of what lies in none of them (unit "")."""
        modules = dict(self._model.named_modules())
        others = [other for other in self._units if other != unit]
        mine = [name for name in modules if (inside(name, unit) or not unit)]
        mine = [name for name in mine if not any(inside(name, other) for other in others)]
        biases = {(modules[name], "bias") for name in self._roles.named("rowwise")} if self._axis.rank else set()
        return LocalView([modules[name] for name in mine], frozenset(biases))

    def partial_parameters(self) -> list[str]:
        """The parameters whose gradients are this rank's share of a sum over the tensor axis.

        Those held whole inside a region, where each rank computes on its own features, and under sequence parallel those in
        the stream, where each rank computes on its own tokens.
        """
        split = set(self._split_dims)
        return [
            name
            for name, _ in self._model.named_parameters()
            if name not in split and (self._dims.sequence_parallel or self._roles.region_of(name) is not None)
        ]

    def _find_split_dims(self) -> dict[str, int]:
        dims: dict[str, int] = {}
        for role, weight_dim in (("embedding", 0), ("head", 0), ("colwise", 0), ("rowwise", 1)):
            for name in self._roles.named(role):
                module = self._model.get_submodule(name)
                dims[f"{name}.weight"] = weight_dim
                if weight_dim == 0 and module._parameters.get("bias") is not None:
                    dims[f"{name}.bias"] = 0
        return dims

    def _distribute_parameters(self) -> None:
        distributed: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
        for module_name, module in self._model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in distributed:
                    split_dim = self._split_dims.get(f"{module_name}.{name}")
                    placement: Placement = Replicate() if split_dim is None else Shard(split_dim)
                    stored = distribute_tensor(parameter.data, self._dims.tp_mesh, [placement], src_data_rank=None)
                    distributed[parameter] = nn.Parameter(stored, requires_grad=parameter.requires_grad)
                module._parameters[name] = distributed[parameter]

    def _split_embedding(self, name: str) -> None:
        embedding = self._model.get_submodule(name)
        vocab_size = embedding.weight.size(0)
        start, stop = self._axis.chunk(vocab_size)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            embedding.padding_idx = embedding.padding_idx - start if start <= embedding.padding_idx < stop else None
        look_up = self.local_view(name)(embedding.forward)
        embedding.forward = _looked_up_in_part(look_up, start, stop, vocab_size, self._leave)

    # -- What can be split -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        size = self._axis.size
        if not self._roles.named("region"):
            raise ConfigError(
                f"Got tensor_parallel_degree {size} and roles without a region. Tensor parallel splits the work of regions. "
                "Name the model's regions and their colwise and rowwise parts, or set tensor_parallel_degree to 1."
            )
        if self._dims.sequence_parallel and not (self._roles.named("embedding") and self._roles.named("head")):
            raise ConfigError(
                "Got sequence_parallel and roles without an embedding or without a head. The stream is split where it leaves the "
                "embedding and gathered where it enters the head. Name both, or set sequence_parallel to false."
            )
        for role in ("colwise", "rowwise", "embedding", "head"):
            for name in self._roles.named(role):
                self._check_weight(name, role)
        for name in self._roles.named("colwise"):
            for option, count in self._roles.options(name).items():
                if count % size:
                    possible = [str(degree) for degree in range(1, count + 1) if count % degree == 0]
                    raise ConfigError(
                        f"Got {option} {count} of {name} over tensor_parallel_degree {size}. Each rank takes whole heads, so the degree "
                        f"divides their number. Set tensor_parallel_degree to {one_of(possible)}."
                    )

    def _check_weight(self, name: str, role: str) -> None:
        weight = self._model.get_submodule(name)._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            got = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
            raise ConfigError(
                f"Got {got} in the {role} part {name}. A {role} part has a matrix named weight. Give the role to the "
                "projection itself."
            )
        features, size = weight.size(1 if role == "rowwise" else 0), self._axis.size
        if role in ("colwise", "rowwise") and features % size:
            raise ConfigError(
                f"Got {features} features of {name} over tensor_parallel_degree {size}. Each rank takes an equal part. "
                f"Set tensor_parallel_degree to a divisor of {features}."
            )
        if features <= (size - 1) * -(-features // size):
            raise ConfigError(
                f"Got a vocabulary of {features} in {name} over tensor_parallel_degree {size}. Each rank holds at least one row. "
                "Lower tensor_parallel_degree."
            )


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
    """`forward` of an embedding that holds rows `start` to `stop`; ids beyond the vocabulary fail on every rank as they do on one."""

    def lookup(ids: Tensor) -> Tensor:
        mine = (ids >= start) & (ids < stop)
        beyond = (ids < 0) | (ids >= vocab_size)
        rows = torch.where(mine, ids - start, torch.where(beyond, vocab_size, 0))
        vectors = forward(rows)
        return leave(vectors.masked_fill(~mine.unsqueeze(-1), 0))

    return lookup
