"""Mixed precision: the dtypes in which weights are stored, weights compute, and gradients are summed.

The inputs of a model keep their dtype: rounding would change the times and positions of a diffusion model. As in
autocast, inputs of modules with weights are cast: the residual streams of blocks, and the inputs of projections,
convolutions and norms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from titan_config import Configurable
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class MixedPrecision(Configurable):
    """Weights are stored in their own dtype; units compute in `param`, and gradients are summed in `reduce`."""

    class Config(Configurable.Config):
        param: Literal["bfloat16", "float32"] = "bfloat16"
        """The dtype of computation; weights, residual streams, inputs of projections and norms are cast to it."""
        reduce: Literal["bfloat16", "float32"] = "float32"
        """The dtype in which gradients are accumulated and summed."""

    def __init__(self, config: Config) -> None:
        self.param_dtype: torch.dtype = getattr(torch, config.param)
        self._reduce_dtype: torch.dtype = getattr(torch, config.reduce)

    def changes(self, model: nn.Module) -> bool:
        """Return whether any weight is stored in another dtype than it is computed in."""
        return any(p.is_floating_point() and p.dtype != self.param_dtype for p in model.parameters())

    def policy(self) -> MixedPrecisionPolicy:
        """Return the policy for `fully_shard`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(
            param_dtype=self.param_dtype, reduce_dtype=self._reduce_dtype, cast_forward_inputs=False
        )

    def cast_inputs(self, model: nn.Module, streams: Mapping[nn.Module, int]) -> None:
        """Cast the inputs of modules with weights, and the first arguments of units: as many as they have `streams`."""
        to_dtype = _to(self.param_dtype)
        for module in model.modules():
            if _multiplies(module):
                module.register_forward_pre_hook(_casts_all(to_dtype), with_kwargs=True)
        for unit, number in streams.items():
            unit.register_forward_pre_hook(_casts_first(to_dtype, unit, number), with_kwargs=True)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments]


def _multiplies(module: nn.Module) -> bool:
    """Return whether a module needs its inputs in the dtype of its weights."""
    weights = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not any(weight.is_floating_point() for weight in weights):
        return False
    weight = module._parameters.get("weight")
    return type(module).__module__.startswith("torch.nn.modules") or (weight is not None and weight.dim() > 1)


def _casts_all(to_dtype: Callable[[Any], Any]) -> Hook:
    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return tuple(map(to_dtype, args)), {name: to_dtype(value) for name, value in kwargs.items()}

    return cast


def _casts_first(to_dtype: Callable[[Any], Any], unit: nn.Module, number: int) -> Hook:
    """Return a hook that casts the first `number` arguments, positional or by keyword."""
    parameters = list(inspect.signature(unit.forward).parameters.values())[:number]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        first = set(names or list(kwargs)[: max(0, number - len(args))])  # no names: a forward of (*args, **kwargs)
        by_position = tuple(to_dtype(arg) if place < number else arg for place, arg in enumerate(args))
        return by_position, {name: to_dtype(value) if name in first else value for name, value in kwargs.items()}

    return cast


def _to(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floats and value.dtype is not dtype else value

    return cast
