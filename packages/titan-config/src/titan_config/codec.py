"""Lossless conversion between configs and plain data: `to_dict` and `from_dict`.

JSON types are stored unchanged; every other type is an object with a tag:

    {"$type": "titan_models.norm:RMSNorm.Config", "dim": 64}       a config
    {"$tuple": [1, 2]}   {"$set": [1, 2]}   {"$frozenset": [1]}    containers
    {"$dict": [[key, value], ...]}                                 a dict with keys that are not strings or begin with $
    {"$path": "outputs"}   {"$dtype": "bfloat16"}   {"$float": "nan"}
    {"$enum": "package.module:Color", "name": "RED"}
    {"$function": "torch.nn.init:zeros_"}
    {"$partial": {"$function": ...}, "args": [...], "keywords": {...}}
"""

from __future__ import annotations

import enum
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from titan_config.checks import describe_value
from titan_config.configurable import Config, check, fill_all
from titan_config.errors import ConfigError, join, label, nearest
from titan_config.importing import DEFAULT_ALLOW, find_class, find_function, path_of
from titan_config.json_text import require_shallow
from titan_config.tree import children


def to_dict(config: Config) -> dict[str, Any]:
    """Return a config as plain JSON data.

    Raises ConfigError if a type or `validate` rule is violated anywhere in the tree, or a value cannot be saved.
    """
    check(config, finite=False)
    return encode(config)


def from_dict(data: dict[str, Any], allow: Sequence[str] = DEFAULT_ALLOW) -> Any:
    """Return the config that `to_dict` encoded as `data`; fields missing from `data` take their defaults.

    Only modules listed in `allow` are imported (see `titan_config.importing`). Raises ConfigError with the path in the
    tree.
    """
    if not (isinstance(data, dict) and "$type" in data):
        raise ConfigError(
            f'A saved config must be an object with "$type": "package.module:Owner.Config", got {describe_value(data)}.'
        )
    require_shallow(data)
    return decode(data, allow)


def encode(value: Any, path: str = "", strict: bool = True) -> Any:
    """Return any value of a config as JSON data.

    Raises ConfigError for a value that `decode` could not restore; with `strict=False` such a value becomes text for
    display.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Config):
        fields = {name: encode(item, join(path, name), strict) for name, item in children(value)}
        return {"$type": _saved_path(type(value), path, strict), **fields}
    if isinstance(value, list):
        return _encode_items(value, path, strict)
    if isinstance(value, (set, frozenset)):
        tag = "$set" if isinstance(value, set) else "$frozenset"
        return {tag: _encode_items(sorted(value, key=repr), path, strict)}
    if type(value) is tuple:
        return {"$tuple": _encode_items(value, path, strict)}
    if isinstance(value, dict):
        return _encode_dict(value, path, strict)
    return _encode_other(value, path, strict)


def _encode_items(items: Sequence[Any], path: str, strict: bool) -> list[Any]:
    return [encode(item, join(path, index), strict) for index, item in enumerate(items)]


def _encode_dict(value: dict[Any, Any], path: str, strict: bool) -> dict[str, Any]:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(item, join(path, key), strict) for key, item in value.items()}
    pairs = [[encode(key, path, strict), encode(item, join(path, key), strict)] for key, item in value.items()]
    return {"$dict": pairs}


def _encode_other(value: Any, path: str, strict: bool) -> dict[str, Any]:
    if isinstance(value, enum.Enum) and value.name in type(value).__members__:
        return {"$enum": _saved_path(type(value), path, strict), "name": value.name}
    if isinstance(value, functools.partial):
        keywords = {name: encode(item, join(path, name), strict) for name, item in value.keywords.items()}
        args = _encode_items(value.args, path, strict)
        return {"$partial": encode(value.func, path, strict), "args": args, "keywords": keywords}
    if hasattr(value, "__fspath__"):
        return {"$path": str(value)}
    if _is_dtype(value):
        return {"$dtype": str(value).removeprefix("torch.")}
    if callable(value) or not strict:
        return {"$function": _saved_path(value, path, strict)}
    raise ConfigError(
        "A saved value must be a number, string, path, dtype, enum, function, config, or a list, tuple, dict or set of "
        f"these, got {describe_value(value)}. Pass live objects to build(**runtime).",
        path,
    )


def _is_dtype(value: Any) -> bool:
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].dtype)


def _saved_path(value: Any, path: str, strict: bool) -> str:
    found = path_of(value)
    if found is not None:
        return found
    if not strict:
        return f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
    raise ConfigError(
        "A saved class or function must have an import path, got "
        f"{describe_value(value)}. Define it at the top level of a module or class: lambdas, bound methods and local "
        "definitions have none.",
        path,
    )


def decode(data: Any, allow: Sequence[str]) -> Any:
    """Return the value that `encode` encoded as `data`. Raises ConfigError for malformed data or forbidden imports."""
    if isinstance(data, list):
        return [_decode_part(item, allow, index) for index, item in enumerate(data)]
    if not isinstance(data, dict):
        return data
    tag = next((key for key in data if key.startswith("$")), None)
    if tag is None:
        return {key: _decode_part(item, allow, key) for key, item in data.items()}
    if tag not in _DECODERS:
        raise ConfigError(f"Unknown tag {tag} in a saved config. {nearest(tag, _DECODERS)}")
    if tag != "$type" and data.keys() != {tag, *_COMPANIONS.get(tag, ())}:
        _malformed(data, tag)
    return _DECODERS[tag](data, allow)


def _decode_part(data: Any, allow: Sequence[str], name: object) -> Any:
    try:
        return decode(data, allow)
    except ConfigError as error:
        error.add_parent(str(name))
        raise


def _decode_config(data: dict[str, Any], allow: Sequence[str]) -> Config:
    cls = find_class(_text(data, "$type"), allow)
    if not issubclass(cls, Config):
        raise ConfigError(f"$type must name a Config class, got {label(cls)}. Use $enum for an enum.")
    config = object.__new__(cls)  # skips __post_init__, which ran before the config was saved
    fill_all(config, {name: _decode_part(item, allow, name) for name, item in data.items() if name != "$type"})
    return config


def _decode_enum(data: dict[str, Any], allow: Sequence[str]) -> enum.Enum:
    cls, name = find_class(_text(data, "$enum"), allow), _text(data, "name")
    if not issubclass(cls, enum.Enum):
        raise ConfigError(f"$enum must name an enum, got {label(cls)}. Use $type for a config.")
    if name not in cls.__members__:
        raise ConfigError(f"{label(cls)} has no member {name!r}. {nearest(name, cls.__members__)}")
    return cls.__members__[name]


def _decode_partial(data: dict[str, Any], allow: Sequence[str]) -> functools.partial[Any]:
    function, args, keywords = (decode(data.get(key), allow) for key in ("$partial", "args", "keywords"))
    if not callable(function) or not isinstance(args, list) or not isinstance(keywords, dict):
        _malformed(data, "$partial")
    return functools.partial(function, *args, **keywords)


def _decode_function(data: dict[str, Any], allow: Sequence[str]) -> Any:
    return find_function(_text(data, "$function"), allow)


def _decode_path(data: dict[str, Any], allow: Sequence[str]) -> Any:
    from pathlib import Path

    return Path(_text(data, "$path"))


def _decode_float(data: dict[str, Any], allow: Sequence[str]) -> float:
    text = _text(data, "$float")
    return float(text) if text in ("nan", "inf", "-inf") else _malformed(data, "$float")


def _decode_dtype(data: dict[str, Any], allow: Sequence[str]) -> Any:
    return find_dtype(_text(data, "$dtype"))


def find_dtype(name: str) -> Any:
    """Return the torch.dtype called `name` ("bfloat16" or "torch.bfloat16"). Imports torch.

    Raises ConfigError for an unknown name.
    """
    import torch

    found = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        dtypes = [key for key, value in vars(torch).items() if isinstance(value, torch.dtype)]
        raise ConfigError(f"torch has no dtype {name!r}. {nearest(name, dtypes)}")
    return found


def _decode_dict(data: dict[str, Any], allow: Sequence[str]) -> dict[Any, Any]:
    pairs = decode(data["$dict"], allow)
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        _malformed(data, "$dict")
    return _collected(dict, pairs, data, "$dict")


def _decode_items(container: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    tag = f"${container.__name__}"

    def decode_items(data: dict[str, Any], allow: Sequence[str]) -> Any:
        items = decode(data[tag], allow)
        return _collected(container, items, data, tag) if isinstance(items, list) else _malformed(data, tag)

    return decode_items


def _collected(container: Callable[[list[Any]], Any], items: list[Any], data: dict[str, Any], tag: str) -> Any:
    try:
        return container(items)
    except TypeError:  # an unhashable dict key or set item
        _malformed(data, tag)


def _text(data: dict[str, Any], key: str) -> str:
    text = data.get(key)
    return text if isinstance(text, str) else _malformed(data, key)


def _malformed(data: dict[str, Any], key: str) -> NoReturn:
    raise ConfigError(
        f"An object with the key {key} must have the format that to_dict writes, got {describe_value(data)}."
    )


_COMPANIONS = {"$enum": ("name",), "$partial": ("args", "keywords")}
_DECODERS: dict[str, Callable[[dict[str, Any], Sequence[str]], Any]] = {
    "$type": _decode_config,
    "$enum": _decode_enum,
    "$partial": _decode_partial,
    "$function": _decode_function,
    "$path": _decode_path,
    "$float": _decode_float,
    "$dtype": _decode_dtype,
    "$dict": _decode_dict,
    "$tuple": _decode_items(tuple),
    "$set": _decode_items(set),
    "$frozenset": _decode_items(frozenset),
}
