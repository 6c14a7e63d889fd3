"""Materialization of a model on the meta device that preserves tied weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]
"""The dict of the parameters or buffers of a module, and a name in the dict."""


def to_empty(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Allocate uninitialized memory for `model` on `device`, keep tied weights tied, and return `model`.

    `nn.Module.to_empty` creates a new tensor for each name, so that a parameter with two names becomes two parameters.
    Here, parameters and buffers that modules share before the call are shared after it.
    """
    shared = _shared_slots(model)
    model.to_empty(device=device)
    for (first, name), *others in shared:
        for tensors, other in others:
            tensors[other] = first[name]
    return model


def _shared_slots(model: nn.Module) -> list[list[Slot]]:
    """Return all slots of each tensor that has several: in several modules, or under several names of one."""
    places: dict[Tensor, list[Slot]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    places.setdefault(tensor, []).append((tensors, name))
    return [slots for slots in places.values() if len(slots) > 1]
