"""Equivalent blocks: a probe of a deep or wide model runs the first of them and skips the others."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.pipeline_parallel.stand_ins import StreamArgument
from titan_parallel.sharding_plan.roles import Roles

_ALWAYS_RUN = 16
"""Number of leading blocks that run even if they are equivalent: some models choose a behavior by the layer index."""
_LARGE = 2**28
"""Number of elements in a block's parameters above which no equivalent block runs twice."""


def representatives(model: nn.Module, roles: Roles, always_run: int = _ALWAYS_RUN) -> dict[nn.Module, nn.Module]:
    """Return {block: the first equivalent block}; each of the first `always_run` blocks maps to itself."""
    firsts: dict[str, nn.Module] = {}
    blocks = [model.get_submodule(name) for name in roles.named("block")]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    always = always_run if max(sizes, default=0) <= _LARGE else 0
    repeats = {block: firsts.setdefault(_description(block), block) for block in blocks}
    return {block: block if index < always else repeats[block] for index, block in enumerate(blocks)}


def forwards_skipping_repeats(
    representatives: Mapping[nn.Module, nn.Module], outputs: dict[nn.Module, Any] | None = None
) -> dict[nn.Module, Callable[..., Any]]:
    """Return {block: forward}; the forward of a repeated block returns its input.

    The input is returned in the format (tensor or tuple) of the representative's output. `outputs` collects the outputs
    of the representatives.
    """
    outputs = {} if outputs is None else outputs
    forwards: dict[nn.Module, Callable[..., Any]] = {}

    def recording(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            outputs[block] = forward(*args, **kwargs)
            return outputs[block]

        return record

    def skipping(block: nn.Module, first: nn.Module) -> Callable[..., Any]:
        argument = StreamArgument(block)

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden, output = argument.of(args, kwargs), outputs[first]
            return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden

        return skip

    repeated = {first for block, first in representatives.items() if first is not block}
    for block, first in representatives.items():
        if first is not block:
            forwards[block] = skipping(block, first)
        elif block in repeated:
            forwards[block] = recording(block)
    return forwards


def _description(block: nn.Module) -> str:
    """Return a text that is equal for equivalent blocks: classes, shapes and settings, without the layer index."""
    module_attributes = vars(nn.Module())
    settings = [
        (name, _settings({key: value for key, value in vars(module).items() if key not in module_attributes}, set()))
        for name, module in block.named_modules()
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in [*block.named_parameters(), *block.named_buffers()]]
    return f"{block!r} {settings} {shapes}"


def _settings(values: Mapping[str, Any], seen: set[int]) -> dict[str, Any]:
    """Return the settings among attributes, without the layer index."""
    return {
        key: _setting(value, seen)
        for key, value in values.items()
        if not any(word in str(key) for word in ("idx", "index", "layer_id"))
    }


def _setting(value: Any, seen: set[int]) -> Any:
    """Return a description of a value, recursively, or its identity. `seen`: ids of the objects that contain it."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, type):
        return value.__module__, value.__qualname__
    if id(value) in seen:
        return type(value).__qualname__
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        return _settings(value, seen)
    if isinstance(value, list | tuple | set | frozenset):
        return [_setting(inner, seen) for inner in value]
    return type(value).__qualname__, _attributes(value, seen)


def _attributes(value: Any, seen: set[int]) -> Any:
    """Return the attributes of a function or an object, or the identity of an object without readable attributes."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, _setting([cells, value.__defaults__], seen)
    if isinstance(value, types.MethodType):
        return _setting([value.__func__, value.__self__], seen)
    if isinstance(value, functools.partial):
        return _setting([value.func, value.args, value.keywords], seen)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    if not hasattr(value, "__dict__") and not slots:
        return id(value)
    named = {name: getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)}
    return _settings({**named, **getattr(value, "__dict__", {})}, seen)
