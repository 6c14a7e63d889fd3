"""Parameters are stored as DTensors, but modules compute with local tensors: the swap between the two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from titan_parallel.tensor_parallel.partial_gradients import PartialGradients

Slot = tuple[nn.Module, str]
"""A module and the name of a parameter in it."""


class LocalView:
    """Swaps the parameters of some modules for this rank's local tensors while a function runs.

    Gradients flow back through the local tensors into the DTensors. Nested calls do not swap again: activation
    checkpointing needs the swap inside the function that it recomputes, torch.compile outside the function that it
    compiles.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        takes: Mapping[Slot, Callable[[Tensor], Tensor]],
        partial: PartialGradients,
        partial_slots: Collection[Slot],
    ) -> None:
        """`takes` maps slots to functions that take this rank's slices of the stored tensor; all others are used whole.

        `partial` sums the gradients of `partial_slots` over ranks.
        """
        self._slots = [(module, name) for module in modules for name, p in module._parameters.items() if p is not None]
        self._takes = takes
        self._partial = partial
        self._partial_slots = [slot for slot in self._slots if slot in partial_slots]
        self._in_place = False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` to run with the local tensors in place."""

        @functools.wraps(function)
        def with_local_parameters(*args: Any, **kwargs: Any) -> Any:
            if self._in_place:
                return function(*args, **kwargs)
            stored = [module._parameters[name] for module, name in self._slots]
            self._in_place = True
            try:
                for (module, name), tensor in self._local_tensors().items():
                    module._parameters[name] = tensor  # type: ignore[assignment]
                return function(*args, **kwargs)
            finally:
                for (module, name), parameter in zip(self._slots, stored, strict=True):
                    module._parameters[name] = parameter
                self._in_place = False

        return with_local_parameters

    def _local_tensors(self) -> dict[Slot, Tensor]:
        tensors: dict[Slot, Tensor] = {
            (module, name): module._parameters[name].to_local()  # type: ignore[union-attr]
            for module, name in self._slots
        }
        trained = [slot for slot in self._partial_slots if tensors[slot].requires_grad]
        tensors.update(zip(trained, self._partial.summed_in_backward([tensors[slot] for slot in trained]), strict=True))
        return {slot: self._takes[slot](tensor) if slot in self._takes else tensor for slot, tensor in tensors.items()}
