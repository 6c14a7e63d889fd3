"""Split the state of a part into tensors and JSON values, and join them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.encoding import decode, encode, has_text_keys, is_dict, is_tagged
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES


class Part(Protocol):
    """An object with a state: a model, an optimizer, a data loader, a step counter.

    The state is a nested dictionary. Its leaves are tensors (plain tensors are equal on all ranks, `DTensor`s are
    sharded) and values: None, bool, int, float, str, bytes, NumPy arrays, and lists, tuples, sets and dictionaries of
    these.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def split(state: Mapping[str, Any], path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state by dotted name, and its other values as a nested JSON copy.

    Raises:
        CheckpointError: for an unsupported leaf, a key above a tensor that is not a string, or two tensors with the
            same name; the message names the path.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{path}.{key}"
        inner: dict[str, Tensor] = {}
        if isinstance(value, Tensor):
            inner = {name: value}
        elif is_dict(value) and has_text_keys(value):
            inner, values[key] = split(value, name)
        else:
            values[key] = encode(value, name, inner)
        for inner_name, tensor in inner.items():
            _check_kind(tensor, inner_name)
            if inner_name in tensors:
                raise CheckpointError(
                    f"The dotted path of a tensor must be unique, got two tensors named {inner_name!r}. Rename one of "
                    "them."
                )
            tensors[inner_name] = tensor
    return tensors, values


def join(template: Mapping[str, Any], values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the nested state with the tensors of `template` and the JSON values of `values`.

    `tensors` provides those inside lists, by path.
    """
    joined = {key: decode(value, tensors) for key, value in values.items()}
    for key, value in template.items():
        if isinstance(value, Tensor):
            joined[key] = value
        elif is_dict(value) and has_text_keys(value):
            inner = values.get(key)
            inner_values = inner if isinstance(inner, dict) and not is_tagged(inner) else {}
            if inner_values or split(value, key)[0]:
                joined[key] = join(value, inner_values, tensors)
    return joined


def merge(values_by_rank: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the union of the JSON values of all ranks.

    Raises:
        CheckpointError: if two ranks disagree on a value; the message states the path, the ranks and both values.
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
        elif repr(value) != repr(merged[key]):  # repr: nan equals nan, and 1 equals neither 1.0 nor True
            raise CheckpointError(
                f"{name} must be equal on all ranks, got {merged[key]!r} on rank {first_rank[name]} and {value!r} on "
                f"rank {rank}. Store values that differ between ranks under keys that contain the rank."
            )


def _check_kind(tensor: Tensor, name: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
        raise CheckpointError(f"{name} must be a dense tensor, got {kind}. Store its dense components instead.")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"The dtype of {name} must be supported by safetensors, got {tensor.dtype}. Store it as another dtype, "
            "such as a view as torch.uint8."
        )


def split_parts(parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return all tensors by `part.dotted.name`, the JSON values by part, and the original state of each part.

    Raises:
        CheckpointError: if a part has an invalid name or state.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    states: dict[str, Mapping[str, Any]] = {}
    for name, part in parts.items():
        if not name or "." in name:
            raise CheckpointError(f"The name of a part must be non-empty and without dots, got {name!r}.")
        states[name] = part.state_dict()
        if not isinstance(states[name], Mapping) or not has_text_keys(states[name]):
            raise CheckpointError(
                f"The state of the part {name!r} must be a dictionary with string keys, got "
                f"{type(states[name]).__name__}. Return one from its state_dict."
            )
        part_tensors, values[name] = split(states[name], name)
        tensors.update(part_tensors)
    return tensors, values, states
