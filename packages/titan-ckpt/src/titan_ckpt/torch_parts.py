"""PyTorch objects as checkpoint parts: wrapped models under their own names, optimizer state by parameter name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_ckpt.errors import CheckpointError, join_names
from titan_ckpt.format.index import Index, StoredTensor
from titan_ckpt.format.state_tree import Part

_KEYS = ("class", "state", "groups", "group_of")


def to_parts(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts with models unwrapped, and torch optimizers as `OptimizerPart`s."""
    unwrapped = {name: _unwrap(part) for name, part in parts.items()}
    names = {
        id(parameter): f"{part_name}.{name}"
        for part_name, part in unwrapped.items()
        if isinstance(part, nn.Module)
        for name, parameter in part.named_parameters()
    }
    return {
        name: OptimizerPart(part, names) if isinstance(part, torch.optim.Optimizer) else part
        for name, part in unwrapped.items()
    }


def _unwrap(part: Part) -> Part:
    """Return the model inside DistributedDataParallel, DataParallel or the result of torch.compile."""
    while True:
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            part = part.module
        elif isinstance(part, _compiled_module()):
            part = part._orig_mod
        else:
            return part


def _compiled_module() -> Any:
    """Return the class of compiled modules, or () if its module is not imported yet.

    `OptimizedModule` is private; tried with torch 2.11 to 2.13.
    """
    module = sys.modules.get("torch._dynamo.eval_frame")
    return () if module is None else module.OptimizedModule


class OptimizerPart:
    """A torch optimizer whose state is stored by parameter name instead of parameter number.

    Its state tensors need not exist before a load, since torch optimizers create them in their first step. Tensors that
    exist only in the checkpoint are allocated with the shape and the sharding of their parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer = optimizer
        self._parameters: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._parameters[names.get(id(parameter), str(len(self._parameters)))] = parameter
        self._stored: Index | None = None

    def expect(self, stored: Index, values: Mapping[str, Any]) -> None:
        """Make `state_dict` return all tensors of `stored`, the index of this part by path, allocating missing ones.

        Raises:
            CheckpointError: if `values`, the JSON values of the part, are not those of an optimizer of the same class
                with the same parameters in the same groups.
        """
        self._check(values)
        self._stored = stored

    def state_dict(self) -> dict[str, Any]:
        """Return the state by parameter name.

        `{"class": name, "state": {parameter: state}, "groups": {number: settings}, "group_of": {parameter: number}}`.
        """
        packed = self._optimizer.state_dict()
        names = list(self._parameters)
        state = {_name(key, names): dict(value) for key, value in packed["state"].items()}
        groups: dict[str, Any] = {}
        group_of: dict[str, int] = {}
        for number, group in enumerate(packed["param_groups"]):
            groups[str(number)] = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            group_of |= {names[place]: number for place in group["params"]}
        if self._stored is not None:
            state = self._make_missing(state, self._stored)
        more = {key: value for key, value in packed.items() if key not in ("state", "param_groups")}
        return {"class": self._class, "state": state, "groups": groups, "group_of": group_of, **more}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Load a state of the same parameters in the same groups.

        Raises:
            CheckpointError: if the class of the optimizer, its parameters or its groups differ.
        """
        self._check(state)
        packed = self._optimizer.state_dict()
        groups, group_of, states = state["groups"], state["group_of"], state["state"]
        places = {name: place for place, name in enumerate(self._parameters)}
        mine = {
            name: {key: item for key, item in value.items() if "[" not in key}  # tensors in lists are in their values
            for name, value in states.items()
            if name in places or name not in group_of
        }
        packed |= {key: value for key, value in state.items() if key not in _KEYS}
        packed["state"] = {places.get(name, name): value for name, value in mine.items()}
        packed["param_groups"] = [
            {**group, **groups[str(number)]} for number, group in enumerate(packed["param_groups"])
        ]
        self._optimizer.load_state_dict(packed)
        for name, value in mine.items():
            if name in places:
                self._restore_types(self._parameters[name], value)

    def _check(self, stored: Mapping[str, Any]) -> None:
        """Check the class, the parameters and the groups of a stored state. Raises CheckpointError."""
        groups, group_of = stored.get("groups"), stored.get("group_of")
        if not isinstance(groups, Mapping) or not isinstance(group_of, Mapping):
            raise CheckpointError(
                f"The state for {self._class} must be that of a torch optimizer, got one with the keys "
                f"{join_names([str(key) for key in stored]) or 'none'}. Load it into the part that it was saved from."
            )
        if stored.get("class", self._class) != self._class:
            raise CheckpointError(
                f"The optimizer must be of the class that it was saved with ({stored['class']}), got "
                f"{self._class}. Build the same optimizer, or start a new run from the model alone (initial_load_path)."
            )
        here = {
            id(parameter): number
            for number, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        other = [name for name, parameter in self._parameters.items() if group_of.get(name) != here[id(parameter)]]
        if other or len(groups) != len(self._optimizer.param_groups):
            raise CheckpointError(
                f"The optimizer must have the parameter groups that it was saved with ({len(groups)}), got "
                f"{len(self._optimizer.param_groups)}, and {len(other)} parameters in another one or none"
                f"{f' ({other[0]} first)' if other else ''}. Build it from the same parameters and groups."
            )

    @property
    def _class(self) -> str:
        return type(self._optimizer).__name__

    def _restore_types(self, parameter: Tensor, loaded: Mapping[str, Any]) -> None:
        """Undo torch's cast of state to the dtype of its parameter: float32 state of bfloat16 weights stays float32."""
        state = self._optimizer.state[parameter]
        for key, value in loaded.items():
            if isinstance(value, Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)

    def _make_missing(self, state: Mapping[str, Any], stored: Index) -> dict[str, Any]:
        """Return a state with all stored tensors: the existing ones, and newly allocated ones for the others."""
        made: dict[str, Any] = {}
        for name, path, tensor in self._find_stored(stored):
            there: Any = state.get(name, {})
            target = made.setdefault(name, {})
            for key in path[:-1]:
                there = there.get(key, {}) if isinstance(there, Mapping) else {}
                target = target.setdefault(key, {})
            found = there.get(path[-1]) if isinstance(there, Mapping) else None
            target[path[-1]] = found if _matches(found, tensor) else _allocate(self._parameters[name], tensor)
        return made

    def _find_stored(self, stored: Index) -> Iterator[tuple[str, list[str], StoredTensor]]:
        """Yield (parameter name, path within its state, stored tensor)."""
        for path, tensor in stored.items():
            words = path.split(".")
            for end in range(len(words) - 1, 1, -1):
                name = ".".join(words[1:end])
                if words[0] == "state" and name in self._parameters:
                    yield name, words[end:], tensor
                    break


def _name(key: Any, names: Sequence[str]) -> str:
    return names[key] if isinstance(key, int) else str(key)


def _matches(found: Any, stored: StoredTensor) -> bool:
    return isinstance(found, Tensor) and tuple(found.shape) == stored.shape and found.dtype == stored.torch_dtype


def _allocate(parameter: Tensor, stored: StoredTensor) -> Tensor:
    if tuple(parameter.shape) == stored.shape:
        return torch.zeros_like(parameter.detach(), dtype=stored.torch_dtype)
    return torch.zeros(stored.shape, dtype=stored.torch_dtype)
