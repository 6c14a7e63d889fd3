"""Command-line parsing of values by the type of the field: tyro's rules, plus rules for functions and dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from titan_config.checks import is_callable, is_dtype
from titan_config.codec import decode, find_dtype
from titan_config.flags import members
from titan_config.importing import find_function
from titan_config.json_text import parse_strictly


def spec_of(annotation: Any, allow: Sequence[str]) -> PrimitiveConstructorSpec[Any]:
    """Return tyro's parser of a value of this type: number of words, metavar, and the function that makes the value."""
    with _registry(allow):
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(annotation, set()))
    if isinstance(spec, PrimitiveConstructorSpec) and not any(map(_holds_lists, members(annotation))):
        return spec
    return _single_word("JSON", lambda text: _json(text, allow))


def _holds_lists(annotation: Any) -> bool:
    """Return whether an annotation is a container of containers, which separate words cannot express."""
    return _is_list(annotation) and any(_is_list(part) for inner in get_args(annotation) for part in members(inner))


def _is_list(annotation: Any) -> bool:
    return (get_origin(annotation) or annotation) in (list, tuple, dict, set, frozenset)


def _registry(allow: Sequence[str]) -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if is_callable(info.type):
            return _single_word("MODULE:FUNCTION", lambda text: find_function(text, allow))
        if info.type is bool:
            return _single_word("True|False", _bool)
        if is_dtype(info.type):
            return _single_word("DTYPE", find_dtype)
        return None

    return registry


def _single_word(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _json(text: str, allow: Sequence[str]) -> Any:
    try:
        return decode(parse_strictly(text), allow)
    except json.JSONDecodeError:
        return text


def read_value(annotation: Any, words: Sequence[str], allow: Sequence[str]) -> Any:
    """Parse `words` as a value of type `annotation` and return it. Raises ValueError if they are not one."""
    others = [member for member in members(annotation) if member is not type(None)]
    if len(others) < len(members(annotation)) and list(words) == ["None"]:
        return None
    spec = spec_of(others[0] if len(others) == 1 else annotation, allow)
    counts = (spec.nargs,) if isinstance(spec.nargs, int) else spec.nargs
    if counts != "*" and len(words) not in counts:
        raise ValueError(f"{len(words)} values")
    if spec.choices is not None and any(word not in spec.choices for word in words):
        raise ValueError(words)
    try:
        with _registry(allow):
            return spec.instance_from_str(list(words))
    except (TypeError, IndexError, AssertionError) as error:  # raised by tyro for tuples and dicts with too few words
        raise ValueError(words) from error
