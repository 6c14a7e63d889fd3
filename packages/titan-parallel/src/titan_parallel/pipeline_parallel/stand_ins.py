"""Stand-ins that replace modules while a pipeline stage runs.

B batch, T tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from titan_parallel._torch.distributed import KeepsNoSubclass, has_no_memory

Call = Callable[..., Any]


class StandIns:
    """Temporarily replaces modules of a model by other calls."""

    def __init__(self, model: nn.Module, calls: Mapping[nn.Module, Call], without_parameters: Mapping[nn.Module, str]):
        """`without_parameters` maps modules whose parameters another stage holds to the names of the modules."""
        stand_ins = {module: StandIn(module, call, without_parameters.get(module)) for module, call in calls.items()}
        self._slots = [
            (parent._modules, name, child, stand_ins[child])
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child in stand_ins
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the modules of the model inside the context."""
        for modules, name, _, stand_in in self._slots:
            modules[name] = stand_in
        try:
            yield
        finally:
            for modules, name, module, _ in self._slots:
                modules[name] = module


class StandIn(nn.Module):
    """A replacement of a module: `call` is the forward; other attributes are read from the module."""

    def __init__(self, module: nn.Module, call: Call, name_without_parameters: str | None) -> None:
        super().__init__()
        self.__dict__["_stood_in_for"] = module  # no child: the stand-in holds no parameters
        self.__dict__["_name_without_parameters"] = name_without_parameters
        self.__dict__["forward"] = call
        del self.__dict__["training"]

    def __getattr__(self, name: str) -> Any:
        module, own_name = self.__dict__["_stood_in_for"], self.__dict__["_name_without_parameters"]
        if own_name is not None and name in module._parameters:
            raise ConfigError(
                "The weight of a module with the role embedding must be read by that module only, got a model that "
                f"reads {own_name}.{name} elsewhere. Other stages of a pipeline do not hold the weight. "
                f"{embedding_role_fix(own_name)}"
            )
        return getattr(module, name)

    def __getitem__(self, key: Any) -> Any:
        return self._container()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._container())

    def __len__(self) -> int:
        return len(self._container())

    def __bool__(self) -> bool:
        return bool(self.__dict__["_stood_in_for"])

    def _container(self) -> Any:
        """Return the `ModuleList` or `ModuleDict`. Raises ConfigError where the stage may not read it yet."""
        check = getattr(self.__dict__["forward"], "check", None)
        if check is not None:
            check()
        return self.__dict__["_stood_in_for"]


def embedding_role_fix(name: str) -> str:
    """Return the fix, for an error message, for an embedding that several stages need."""
    return f"Remove the role embedding from {name}; every stage then holds it."


class Stream(KeepsNoSubclass):
    """The output of a skipped block: hidden states that can also be read as `output[0]` of a tuple."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            if index == 0:
                return self.plain()
            raise ConfigError(
                f"Blocks of a pipeline must exchange hidden states only, got a model that reads output {index} of a "
                "block. Set pipeline_parallel_degree to 1."
            )
        return self.plain()[index]

    def __iter__(self) -> Any:
        raise ConfigError(
            "Blocks of a pipeline must exchange hidden states only, got a model that unpacks the output of a block. "
            "Read the hidden states as output[0], or set pipeline_parallel_degree to 1."
        )


def as_stream(tensor: Tensor) -> Tensor:
    """Return `tensor` as the output of a skipped block. Tensors of a dry run are returned unchanged."""
    return tensor if has_no_memory(tensor) else tensor.as_subclass(Stream)


def stream_in(output: Any) -> Tensor:
    """Return the hidden states in the output of a block: the output, or its first item."""
    return output[0] if isinstance(output, tuple | list) else output


class StreamArgument:
    """The first parameter of the forward of a block, the hidden states, passed by position or by keyword."""

    def __init__(self, block: nn.Module) -> None:
        parameters = list(inspect.signature(block.forward).parameters.values())
        named = bool(parameters) and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._name = parameters[0].name if named else None

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the hidden states among the arguments of a call of the block."""
        return args[0] if args else kwargs[self._key(kwargs)]

    def replaced(
        self, stream: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with `stream` as the hidden states."""
        return ((stream, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, self._key(kwargs): stream})

    def others(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the other arguments by keyword, or as `argument 1`, `argument 2`, ... by position."""
        if args:
            return {**{f"argument {place}": value for place, value in enumerate(args[1:], start=1)}, **kwargs}
        return {name: value for name, value in kwargs.items() if name != self._key(kwargs)}

    def _key(self, kwargs: Mapping[str, Any]) -> str:
        return self._name if self._name is not None and self._name in kwargs else next(iter(kwargs))


def zeros_of(shape_of: Call) -> Call:
    """Return a call that runs `shape_of` on the meta device and returns zeros of the shape of its output."""

    def zeros(*args: Any, **kwargs: Any) -> Any:
        device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if device is None:
            raise ConfigError(
                "A module with the role embedding must be called with a tensor, got "
                f"{type(shape_of).__name__}, which is called without one. Remove the role embedding from it; every "
                "stage then holds it."
            )
        meta_args, meta_kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        with torch.no_grad():
            shape = shape_of(*meta_args, **meta_kwargs)
        return tree_map_only(Tensor, lambda meta: torch.zeros_like(meta, device=device), shape)

    return zeros


def refuse(module: nn.Module) -> Call:
    """Return a call that raises ConfigError, for a module after the blocks that is called before them."""

    def called(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"A module that is called before the blocks must be defined before them, got {type(module).__name__}, "
            "which is defined after them and belongs to the last stage of the pipeline. Define it before the blocks."
        )

    called.check = called  # type: ignore[attr-defined]
    return called
