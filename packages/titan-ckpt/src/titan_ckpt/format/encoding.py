"""JSON encoding of state values; a type that JSON lacks becomes an object with a single tag key."""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from titan_ckpt.errors import CheckpointError

_TUPLE, _SET, _ITEMS, _BYTES, _ARRAY, _TENSOR = (
    "__tuple__",  # {"__tuple__": [...]}
    "__set__",
    "__items__",  # [[key, value], ...]: a dictionary with keys that are not strings
    "__bytes__",  # base64
    "__array__",  # [NumPy name of the dtype, shape ([]: a scalar, null: an array without axes), base64]
    "__tensor__",  # name of the tensor in the index
)
_TAGS = {_TUPLE, _SET, _ITEMS, _BYTES, _ARRAY, _TENSOR}

_MAX_DIGITS = 4300
"""Python's limit on the digits of an integer in JSON."""
_INT_LIMIT = 10**_MAX_DIGITS


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON data, and add the tensors in it to `tensors`, by path.

    Raises:
        CheckpointError: if a value has an unsupported type; the message names its path.
    """
    kind = type(value)
    if kind is int and abs(value) >= _INT_LIMIT:
        raise CheckpointError(
            f"{path} must be an integer of at most {_MAX_DIGITS} digits, got one of {value.bit_length()} bits. Store "
            "it as bytes."
        )
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if kind is tuple:
        return {_TUPLE: _encode_items(value, path, tensors)}
    if kind is list:
        return _encode_items(value, path, tensors)
    if kind is set:
        return {_SET: _encode_items(sorted(value, key=repr), path, tensors)}
    if kind is bytes:
        return {_BYTES: base64.b64encode(value).decode()}
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufcSUmM":
        shape = list(value.shape) if value.shape or isinstance(value, np.generic) else None
        return {_ARRAY: [value.dtype.str, shape, base64.b64encode(value.tobytes()).decode()]}
    if is_dict(value):
        return _encode_mapping(value, path, tensors)
    raise CheckpointError(
        f"{path} must be a tensor, number, string, bytes, NumPy array, list, tuple, set or dictionary, got "
        f"{_name(kind)}. Return the fields of the object from state_dict and restore them in load_state_dict "
        "(checkpoints contain no pickles)."
    )


def is_dict(value: Any) -> bool:
    """Return whether a value is stored as a dictionary: dict and the subclasses that torch optimizers use."""
    return type(value) in (dict, OrderedDict, defaultdict, Counter)


def has_text_keys(value: Mapping[Any, Any]) -> bool:
    """Return whether all keys are strings, like names of tensors, and the mapping does not look like a tagged value."""
    return all(type(key) is str for key in value) and not is_tagged(dict(value))


def is_tagged(value: Any) -> bool:
    """Return whether a JSON value encodes a type that JSON lacks."""
    return isinstance(value, dict) and len(value) == 1 and not _TAGS.isdisjoint(value)


def decode(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Return the encoded value, with its tensors taken from `tensors` by path; None leaves their placeholders.

    Raises:
        KeyError, TypeError, ValueError: if the data was not written by `encode`.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not is_tagged(value):
        return {key: decode(item, tensors) for key, item in value.items()}
    ((tag, content),) = value.items()
    if tag == _TENSOR:
        return value if tensors is None else tensors[content]
    if tag == _BYTES:
        return base64.b64decode(content)
    if tag == _ARRAY:
        return _decode_array(*content)
    items = [decode(item, tensors) for item in content]
    return dict(items) if tag == _ITEMS else set(items) if tag == _SET else tuple(items)


def _decode_array(dtype: str, shape: list[int] | None, content: str) -> Any:
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"the dtype of an array must be numeric or text, got {dtype}")
    array = np.frombuffer(base64.b64decode(content), kind).reshape(shape or ()).copy()
    return array[()] if shape == [] else array


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _encode_items(items: Iterable[Any], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [encode(item, f"{path}[{place}]", tensors) for place, item in enumerate(items)]


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    if has_text_keys(value):
        return {key: encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
    keys = [encode(key, f"a key of {path}", tensors) for key in value]
    items = [encode(item, f"{path}[{key!r}]", tensors) for key, item in value.items()]
    return {_ITEMS: [list(pair) for pair in zip(keys, items, strict=True)]}
