"""Objects of torch as parts of a checkpoint: wrapped models by their own names, and optimizers by the models' names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.format.index import Index, StoredTensor
from titan_ckpt.format.state_tree import Part

_KEYS = ("class", "state", "groups", "group_of")


def to_parts(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts: models without their wrappers, and torch's optimizers as `OptimizerPart`s."""
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
    """The model inside DistributedDataParallel, DataParallel and what torch.compile returns."""
    while True:
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            part = part.module
        elif isinstance(part, _compiled_module()):
            part = part._orig_mod
        else:
            return part


def _compiled_module() -> Any:
    """The class of what torch.compile returns: private, in torch 2.11 to 2.13; none before its module is imported."""
    module = sys.modules.get("torch._dynamo.eval_frame")
    return () if module is None else module.OptimizedModule


class OptimizerPart:
    """A torch optimizer: its state under the names of parameters, in place of their numbers.

    Its tensors need not be there before a load: torch's optimizers make them in their first step. What a checkpoint
    has of them is made as large, and sharded, as their parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer = optimizer
        self._parameters: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._parameters[names.get(id(parameter), str(len(self._parameters)))] = parameter
        self._stored: Index | None = None

    def expect(self, stored: Index, values: Mapping[str, Any]) -> None:
        """From now on, `state_dict` has the tensors that are stored: `stored` has those of this part by their paths.

        Raises:
            CheckpointError: when `values`, what is stored beside them, are not those of an optimizer of this class with
                these parameters in these groups.
        """
        self._check(values)
        self._stored = stored

    def state_dict(self) -> dict[str, Any]:
        """The state by names.

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
        """Take up a state of these parameters in these groups.

        Raises:
            CheckpointError: when the optimizer's class, the parameters or the groups are others.
        """
        self._check(state)
        packed = self._optimizer.state_dict()
        groups, group_of, states = state["groups"], state["group_of"], state["state"]
        places = {name: place for place, name in enumerate(self._parameters)}
        mine = {
            name: {key: item for key, item in value.items() if "[" not in key}  # tensors of lists: in these by now
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
        """Check that a state is of this class, with these parameters in these groups. Raises CheckpointError."""
        groups, group_of = stored.get("groups"), stored.get("group_of")
        if not isinstance(groups, Mapping) or not isinstance(group_of, Mapping):
            raise CheckpointError(
                f"The state for a {self._class} must be that of a torch optimizer, got one with the keys "
                f"{listed([str(key) for key in stored]) or 'none'}. Load it into the part that it was saved from."
            )
        if stored.get("class", self._class) != self._class:
            raise CheckpointError(
                f"The optimizer must be of the class that it was saved with ({stored['class']}), got "
                f"{self._class}. Build the same optimizer, or begin a new run with the model alone (initial_load_path)."
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
        """Undo what torch casts to the parameter's type: an optimizer may keep float32 beside bfloat16."""
        state = self._optimizer.state[parameter]
        for key, value in loaded.items():
            if isinstance(value, Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)

    def _make_missing(self, state: Mapping[str, Any], stored: Index) -> dict[str, Any]:
        """The tensors that are stored of the state: those that there are, and new ones in place of the others."""
        made: dict[str, Any] = {}
        for name, path, tensor in self._find_stored(stored):
            there: Any = state.get(name, {})
            target = made.setdefault(name, {})
            for key in path[:-1]:
                there = there.get(key, {}) if isinstance(there, Mapping) else {}
                target = target.setdefault(key, {})
            found = there.get(path[-1]) if isinstance(there, Mapping) else None
            target[path[-1]] = found if _fits(found, tensor) else _new(self._parameters[name], tensor)
        return made

    def _find_stored(self, stored: Index) -> Iterator[tuple[str, list[str], StoredTensor]]:
        """Yield (parameter name, path below it, stored tensor)."""
        for path, tensor in stored.items():
            words = path.split(".")
            for end in range(len(words) - 1, 1, -1):
                name = ".".join(words[1:end])
                if words[0] == "state" and name in self._parameters:
                    yield name, words[end:], tensor
                    break


def _name(key: Any, names: Sequence[str]) -> str:
    return names[key] if isinstance(key, int) else str(key)


def _fits(found: Any, stored: StoredTensor) -> bool:
    return isinstance(found, Tensor) and tuple(found.shape) == stored.shape and found.dtype == stored.torch_dtype


def _new(parameter: Tensor, stored: StoredTensor) -> Tensor:
    if tuple(parameter.shape) == stored.shape:
        return torch.zeros_like(parameter.detach(), dtype=stored.torch_dtype)
    return torch.zeros(stored.shape, dtype=stored.torch_dtype)
