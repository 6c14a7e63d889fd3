"""Replace modules during a pipeline stage.

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
    """Puts other calls in the place of modules of a model, for a time."""

    def __init__(self, model: nn.Module, calls: Mapping[nn.Module, Call], without_parameters: Mapping[nn.Module, str]):
        """`without_parameters`: modules whose parameters are another stage's, with their names."""
        stand_ins = {module: StandIn(module, call, without_parameters.get(module)) for module, call in calls.items()}
        self._slots = [
            (parent._modules, name, child, stand_ins[child])
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child in stand_ins
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the modules of the model."""
        for modules, name, _, stand_in in self._slots:
            modules[name] = stand_in
        try:
            yield
        finally:
            for modules, name, module, _ in self._slots:
                modules[name] = module


class StandIn(nn.Module):
    """In the place of a module while a stage runs: `call` is its forward, all else is the module's."""

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
                f"A weight with the role embedding must be read by its own module alone, got a model that reads {name} "
                f"of {own_name} elsewhere. Other stages of a pipeline do not hold it. {leave_the_role_away(own_name)}"
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
        """The list or dict of modules, unless it may not be read now."""
        check = getattr(self.__dict__["forward"], "check", None)
        if check is not None:
            check()
        return self.__dict__["_stood_in_for"]


def leave_the_role_away(name: str) -> str:
    """The remedy for an embedding that other stages need, too."""
    return f"Remove the role embedding from {name}; every stage then holds it."


class Stream(KeepsNoSubclass):
    """What a skipped block returns: a tensor that may be taken as if it were the first of a tuple."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            if index == 0:
                return self.plain()
            raise ConfigError(
                f"Blocks of a pipeline must exchange the stream alone, got a model that reads output {index} of a "
                "block. Set pipeline_parallel_degree to 1."
            )
        return self.plain()[index]

    def __iter__(self) -> Any:
        raise ConfigError(
            "Blocks of a pipeline must exchange the stream alone, got a model that unpacks what a block returns. Take "
            "the stream as output[0], or set pipeline_parallel_degree to 1."
        )


def as_stream(tensor: Tensor) -> Tensor:
    """A tensor as what a skipped block returns. (Those of plans have a class of their own.)"""
    return tensor if has_no_memory(tensor) else tensor.as_subclass(Stream)


def stream_in(output: Any) -> Tensor:
    """The stream in what a block returns: that, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


class StreamArgument:
    """A block's first parameter, which is the stream, given by place or by name."""

    def __init__(self, block: nn.Module) -> None:
        parameters = list(inspect.signature(block.forward).parameters.values())
        named = bool(parameters) and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._name = parameters[0].name if named else None

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The stream among what a block is called with."""
        return args[0] if args else kwargs[self._key(kwargs)]

    def replaced(
        self, stream: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another stream."""
        return ((stream, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, self._key(kwargs): stream})

    def others(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What else a block is called with, by name or place."""
        if args:
            return {**{f"argument {place}": value for place, value in enumerate(args[1:], start=1)}, **kwargs}
        return {name: value for name, value in kwargs.items() if name != self._key(kwargs)}

    def _key(self, kwargs: Mapping[str, Any]) -> str:
        return self._name if self._name is not None and self._name in kwargs else next(iter(kwargs))


def zeros_of(shape_of: Call) -> Call:
    """A call that returns zeros of the shape that `shape_of` finds for tensors on the meta device."""

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
    """The call of a module after the blocks, before them."""

    def called(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"A module that is called before the blocks must be defined before them, got {type(module).__name__}, "
            "which is defined after them and belongs to the last stage of the pipeline. Define it before the blocks."
        )

    called.check = called  # type: ignore[attr-defined]
    return called
