"""A part's state taken apart into tensors and JSON values, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from titan_ckpt.errors import CheckpointError
from titan_ckpt.tensor_file import DTYPE_NAMES

_TUPLE = "__tuple__"  # JSON has no tuples; {"__tuple__": [...]} is one


class Part(Protocol):
    """Something with a state: a model, an optimizer, a data loader, a step counter.

    The state is a nested dictionary with string keys. Its leaves are tensors (plain ones are the same on every rank,
    `DTensor`s are sharded) and JSON values: None, bool, int, float, str, and lists, tuples and dictionaries of these.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def split(state: Mapping[str, Any], path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state by their dotted names, and its JSON values as a nested copy.

    Raises:
        CheckpointError: for a leaf that is neither, a key that is no string, or two tensors of one name; it names the
            path.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        _check_key(key, path)
        name = f"{path}.{key}"
        if isinstance(value, Tensor):
            _check_dtype(value, name)
            inner = {name: value}
        elif isinstance(value, Mapping):
            inner, values[key] = split(value, name)
        else:
            inner, values[key] = {}, _encode(value, name)
        for inner_name, tensor in inner.items():
            if inner_name in tensors:
                raise CheckpointError(
                    f"Got two tensors named {inner_name!r}. A tensor's dotted path must be its own. Rename one of them."
                )
            tensors[inner_name] = tensor
    return tensors, values


def join(template: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested state with the tensors of `template` and the JSON values of `values`."""
    joined = {key: _decode(value) for key, value in values.items()}
    for key, value in template.items():
        if isinstance(value, Tensor):
            joined[key] = value
        elif isinstance(value, Mapping):
            inner = values.get(key)
            inner_values = inner if isinstance(inner, dict) and _TUPLE not in inner else {}
            if inner_values or split(value, key)[0]:
                joined[key] = join(value, inner_values)
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


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"Got the tensor {name} of type {tensor.dtype}. A tensor's type must be one that safetensors has. Store "
            f"it as another, such as a view as torch.uint8."
        )


def _check_key(key: Any, path: str) -> None:
    if not isinstance(key, str):
        raise CheckpointError(
            f"Got the key {key!r} of type {type(key).__name__} in {path}. The keys of a state must be strings, which "
            f"is what JSON has. Use str(key)."
        )


def _encode(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: _encode_items(value, path)}
    if isinstance(value, list):
        return _encode_items(value, path)
    if isinstance(value, Mapping):
        for key in value:
            _check_key(key, path)
        return {key: _encode(item, f"{path}.{key}") for key, item in value.items()}
    raise CheckpointError(
        f"Got a {type(value).__name__} at {path}. A state holds tensors (in dictionaries) and JSON values, since a "
        f"checkpoint holds no pickles. Turn it into numbers, text, lists or a tensor."
    )


def _encode_items(items: Iterable[Any], path: str) -> list[Any]:
    return [_encode(item, f"{path}[{place}]") for place, item in enumerate(items)]


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TUPLE}:
            return tuple(_decode(item) for item in value[_TUPLE])
        return {key: _decode(item) for key, item in value.items()}
    return value


def split_parts(parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return all tensors by `part.dotted.name`, the JSON values by part, and each part's state as it gave it."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    states: dict[str, Mapping[str, Any]] = {}
    for name, part in parts.items():
        if not name or "." in name:
            raise CheckpointError(f"Got a part named {name!r}. A part's name must have letters and no dot. Rename it.")
        states[name] = part.state_dict()
        part_tensors, values[name] = split(states[name], name)
        tensors.update(part_tensors)
    return tensors, values, states
