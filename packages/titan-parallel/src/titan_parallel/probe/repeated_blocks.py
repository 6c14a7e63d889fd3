"""Blocks that do what an earlier one does: a probe of a deep or wide model passes over them."""

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
"""So many of the first blocks run though they seem alike: some do other things by their number."""
_LARGE = 2**28
"""Numbers in the parameters of a block above which none runs twice."""


def first_of_kind(model: nn.Module, roles: Roles, always_run: int = _ALWAYS_RUN) -> dict[nn.Module, nn.Module]:
    """Block -> the first block that does the same; `always_run` of the first blocks are their own."""
    firsts: dict[str, nn.Module] = {}
    blocks = [model.get_submodule(name) for name in roles.named("block")]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    always = always_run if max(sizes, default=0) <= _LARGE else 0
    repeats = {block: firsts.setdefault(_kind(block), block) for block in blocks}
    return {block: block if index < always else repeats[block] for index, block in enumerate(blocks)}


def skipping(
    first_of_kind: Mapping[nn.Module, nn.Module], returned: dict[nn.Module, Any] | None = None
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of blocks: those that do what an earlier one does pass the stream on, as that one returned it.

    `returned` is what the first blocks have returned so far.
    """
    returned = {} if returned is None else returned
    forwards: dict[nn.Module, Callable[..., Any]] = {}

    def keeping(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            returned[block] = forward(*args, **kwargs)
            return returned[block]

        return keep

    def passing_on(block: nn.Module, first: nn.Module) -> Callable[..., Any]:
        argument = StreamArgument(block)

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            stream, output = argument.of(args, kwargs), returned[first]
            return type(output)((stream, *output[1:])) if isinstance(output, tuple | list) else stream

        return pass_on

    repeated = {first for block, first in first_of_kind.items() if first is not block}
    for block, first in first_of_kind.items():
        if first is not block:
            forwards[block] = passing_on(block, first)
        elif block in repeated:
            forwards[block] = keeping(block)
    return forwards


def _kind(block: nn.Module) -> str:
    """A text that two blocks share if they do the same: classes, shapes and settings, but for their number."""
    own = vars(nn.Module())
    settings = [
        (name, _settings({key: value for key, value in vars(module).items() if key not in own}, set()))
        for name, module in block.named_modules()
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in [*block.named_parameters(), *block.named_buffers()]]
    return f"{block!r} {settings} {shapes}"


def _settings(values: Mapping[str, Any], seen: set[int]) -> dict[str, Any]:
    """The settings among attributes, but for the number of a layer."""
    return {
        key: _setting(value, seen)
        for key, value in values.items()
        if not any(word in str(key) for word in ("idx", "index", "layer_id"))
    }


def _setting(value: Any, seen: set[int]) -> Any:
    """What describes a value to its last attribute, or its identity; `seen` are the objects that it is inside of."""
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
    """Those of a function or an object; its identity where it keeps what nobody can read."""
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
