"""Values of a state as JSON: what JSON lacks is an object whose only key says what it is."""

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
    "__items__",  # [[key, value], ...]: a dictionary with keys that are no text
    "__bytes__",  # base64
    "__array__",  # [numpy's name of the type, shape ([]: a number, null: an array of no axes), base64]
    "__tensor__",  # its name in the index
)
_TAGS = {_TUPLE, _SET, _ITEMS, _BYTES, _ARRAY, _TENSOR}

_MAX_DIGITS = 4300
"""Python reads no more digits of an integer in JSON."""
_TOO_LARGE = 10**_MAX_DIGITS


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; the tensors in it are added to `tensors`, by their paths.

    Raises:
        CheckpointError: for a value of another type; it names the path.
    """
    kind = type(value)
    if kind is int and abs(value) >= _TOO_LARGE:
        raise CheckpointError(
            f"{path} must be an integer of at most {_MAX_DIGITS} digits, got one of {value.bit_length()} bits. "
            f"Store it as bytes."
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
    if is_dictionary(value):
        return _encode_mapping(value, path, tensors)
    raise CheckpointError(
        f"{path} must be a tensor, number, text, bytes, numpy array, list, tuple, set or dictionary, got "
        f"{_name(kind)}. A checkpoint holds no pickles and gives back the types that it got: store the fields of such "
        f"an object in state_dict, and set them in load_state_dict."
    )


def is_dictionary(value: Any) -> bool:
    """Return whether a value is kept as a dictionary: torch's optimizers and schedulers have the three others."""
    return type(value) in (dict, OrderedDict, defaultdict, Counter)


def has_names(value: Mapping[Any, Any]) -> bool:
    """Return whether the keys are text, as names of tensors are."""
    return all(type(key) is str for key in value) and not is_tagged(dict(value))


def is_tagged(value: Any) -> bool:
    """Return whether a JSON value stands for one that JSON lacks."""
    return isinstance(value, dict) and len(value) == 1 and not _TAGS.isdisjoint(value)


def decode(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Return the value that was encoded, with tensors of these paths; without `tensors` their places stay as they are.

    Raises:
        KeyError, TypeError, ValueError: when it was not made by `encode`.
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
        raise ValueError(f"an array must be of numbers or text, got {dtype}")
    array = np.frombuffer(base64.b64decode(content), kind).reshape(shape or ()).copy()
    return array[()] if shape == [] else array


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _encode_items(items: Iterable[Any], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [encode(item, f"{path}[{place}]", tensors) for place, item in enumerate(items)]


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    if has_names(value):
        return {key: encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
    keys = [encode(key, f"a key of {path}", tensors) for key in value]
    items = [encode(item, f"{path}[{key!r}]", tensors) for key, item in value.items()]
    return {_ITEMS: [list(pair) for pair in zip(keys, items, strict=True)]}
