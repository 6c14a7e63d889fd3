"""The precisions of a run: weights are stored in one dtype, computed in another, and gradients summed in a third.

A model's inputs keep their dtype: times and positions of a diffusion model are no numbers to round. What is cast, as
autocast does, is what meets weights: the stream that enters a block, and what projections, convolutions and norms get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from titan_config import Configurable
from torch import Tensor, nn

from titan_parallel.pipeline_parallel.stand_ins import StreamArgument

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class MixedPrecision(Configurable):
    """Weights keep the dtype they are stored in; units compute in `param`, gradients are summed in `reduce`."""

    class Config(Configurable.Config):
        param: Literal["bfloat16", "float32"] = "bfloat16"
        """What weights, the stream, and the inputs of projections and norms are cast to for computing."""
        reduce: Literal["bfloat16", "float32"] = "float32"
        """What gradients are cast to before they are accumulated and summed."""

    def __init__(self, config: Config) -> None:
        self.param_dtype: torch.dtype = getattr(torch, config.param)
        self._reduce_dtype: torch.dtype = getattr(torch, config.reduce)

    def changes(self, model: nn.Module) -> bool:
        """Return whether any weight is stored in another dtype than it is computed in."""
        return any(p.is_floating_point() and p.dtype != self.param_dtype for p in model.parameters())

    def policy(self) -> MixedPrecisionPolicy:
        """What `fully_shard` takes."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(
            param_dtype=self.param_dtype, reduce_dtype=self._reduce_dtype, cast_forward_inputs=False
        )

    def cast_inputs(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Cast what enters the weights of `model`, and of what enters `blocks` the stream, their first argument."""
        to_dtype = _to(self.param_dtype)
        for module in model.modules():
            if _multiplies(module):
                module.register_forward_pre_hook(_casts_all(to_dtype), with_kwargs=True)
        for block in blocks:
            block.register_forward_pre_hook(_casts_stream(to_dtype, StreamArgument(block)), with_kwargs=True)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments]


def _multiplies(module: nn.Module) -> bool:
    """Return whether a module is of those that need their inputs in the dtype of their weights."""
    weights = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not any(weight.is_floating_point() for weight in weights):
        return False
    weight = module._parameters.get("weight")
    return type(module).__module__.startswith("torch.nn.modules") or (weight is not None and weight.dim() > 1)


def _casts_all(to_dtype: Callable[[Any], Any]) -> Hook:
    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return tuple(map(to_dtype, args)), {name: to_dtype(value) for name, value in kwargs.items()}

    return cast


def _casts_stream(to_dtype: Callable[[Any], Any], stream: StreamArgument) -> Hook:
    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return stream.replaced(to_dtype(stream.of(args, kwargs)), args, kwargs)

    return cast


def _to(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floats and value.dtype is not dtype else value

    return cast
