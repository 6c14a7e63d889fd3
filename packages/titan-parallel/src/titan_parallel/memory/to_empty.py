"""Memory for a model on the meta device, with tied tensors still tied afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]
"""The parameters or buffers of a module, and the name of one of them."""


def to_empty(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give `model` uninitialized memory on `device` and return it, as `nn.Module.to_empty` does, and keep tied weights.

    PyTorch makes a new tensor for each name, so that a parameter with two names becomes two parameters. Parameters and
    buffers that modules share before the call are shared after it.
    """
    shared = _shared_slots(model)
    model.to_empty(device=device)
    for (first, name), *others in shared:
        for tensors, other in others:
            tensors[other] = first[name]
    return model


def _shared_slots(model: nn.Module) -> list[list[Slot]]:
    """For each tensor that several modules, or one of them under several names, hold: all of its places."""
    places: dict[Tensor, list[Slot]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    places.setdefault(tensor, []).append((tensors, name))
    return [slots for slots in places.values() if len(slots) > 1]
