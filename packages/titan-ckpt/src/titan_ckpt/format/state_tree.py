"""A part's state taken apart into tensors and JSON values, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.encoding import decode, encode, has_names, is_dictionary, is_tagged
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES


class Part(Protocol):
    """Something with a state: a model, an optimizer, a data loader, a step counter.

    The state is a nested dictionary. Its leaves are tensors (plain ones are the same on every rank, `DTensor`s are
    sharded) and values: None, bool, int, float, str, bytes, numpy arrays, and lists, tuples, sets and dictionaries of
    these.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def split(state: Mapping[str, Any], path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state by their dotted names, and its other values as a nested copy in JSON.

    Raises:
        CheckpointError: for a leaf that is neither, a key on the way to a tensor that is no text, or two tensors of
            one name; it names the path.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{path}.{key}"
        inner: dict[str, Tensor] = {}
        if isinstance(value, Tensor):
            inner = {name: value}
        elif is_dictionary(value) and has_names(value):
            inner, values[key] = split(value, name)
        else:
            values[key] = encode(value, name, inner)
        for inner_name, tensor in inner.items():
            _check_kind(tensor, inner_name)
            if inner_name in tensors:
                raise CheckpointError(
                    f"Got two tensors named {inner_name!r}. A tensor's dotted path must be its own. Rename one of them."
                )
            tensors[inner_name] = tensor
    return tensors, values


def join(template: Mapping[str, Any], values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the nested state with the tensors of `template` and the JSON values of `values`.

    `tensors` has those in lists, by their paths.
    """
    joined = {key: decode(value, tensors) for key, value in values.items()}
    for key, value in template.items():
        if isinstance(value, Tensor):
            joined[key] = value
        elif is_dictionary(value) and has_names(value):
            inner = values.get(key)
            inner_values = inner if isinstance(inner, dict) and not is_tagged(inner) else {}
            if inner_values or split(value, key)[0]:
                joined[key] = join(value, inner_values, tensors)
    return joined


def merge(values_by_rank: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the union of the JSON values of all ranks.

    Raises:
        CheckpointError: when two ranks disagree on a value; it names the path, the ranks and both values.
    """
    merged: dict[str, Any] = {}
    first_rank: dict[str, int] = {}
    for rank, values in enumerate(values_by_rank):
        _add(merged, values, "", rank, first_rank)
    return merged


def _add(merged: dict[str, Any], values: Mapping[str, Any], path: str, rank: int, first_rank: dict[str, int]) -> None:
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if key not in merged:
            first_rank[name] = rank
            merged[key] = {} if isinstance(value, dict) else value
        if isinstance(value, dict) and isinstance(merged[key], dict):
            _add(merged[key], value, name, rank, first_rank)
        elif repr(value) != repr(merged[key]):  # so that nan equals nan, and 1 is neither 1.0 nor True
            raise CheckpointError(
                f"Got {name} = {merged[key]!r} on rank {first_rank[name]} and {value!r} on rank {rank}. A value has "
                f"one name for all ranks, so it must be equal on all. Put what belongs to one rank under a key of "
                f"that rank."
            )


def _check_kind(tensor: Tensor, name: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"one of the layout {tensor.layout}"
        raise CheckpointError(f"{name} must be a dense tensor, got {kind}. Store the dense tensors that it is made of.")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"Got the tensor {name} of type {tensor.dtype}. A tensor's type must be one that safetensors has. Store "
            f"it as another, such as a view as torch.uint8."
        )


def split_parts(parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return all tensors by `part.dotted.name`, the JSON values by part, and each part's state as it gave it."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    states: dict[str, Mapping[str, Any]] = {}
    for name, part in parts.items():
        if not name or "." in name:
            raise CheckpointError(f"Got a part named {name!r}. A part's name must have letters and no dot. Rename it.")
        states[name] = part.state_dict()
        if not isinstance(states[name], Mapping) or not has_names(states[name]):
            raise CheckpointError(
                f"The state of the part {name!r} must be a dictionary whose keys are text, got a "
                f"{type(states[name]).__name__}. Give a part whose state_dict returns one."
            )
        part_tensors, values[name] = split(states[name], name)
        tensors.update(part_tensors)
    return tensors, values, states
