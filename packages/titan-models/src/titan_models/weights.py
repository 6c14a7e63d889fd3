"""Initialization of the weights of a model from one seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_models.initialization.counter_based_rng import ShardLocation, key_of
from titan_models.initialization.local_shard import local_shard
from titan_models.layers.layer import Layer


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Initialize each parameter of `model` in place.

    The random numbers are keyed by the seed, the fully qualified name of the parameter and the position in the global
    tensor, so that the global tensor has the same bits under any sharding. Parameters may be plain or `DTensor`, on any
    device and of any dtype. A tied parameter is initialized once, by its first name. Persistent buffers are initialized
    too. Raises ValueError for a parameter or buffer without an initializer or on the meta device.
    """
    seen: set[Tensor] = set()
    state = model.state_dict(keep_vars=True)
    for prefix, module in model.named_modules():
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        own |= dict(module.named_buffers(recurse=False))
        initializers = module.initializers() if isinstance(module, Layer) else {}
        for name, parameter in own.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if parameter in seen or full_name not in state:
                continue
            seen.add(parameter)
            if name not in initializers:
                raise ValueError(
                    f"Each parameter and persistent buffer must have an initializer, got none for {full_name} of a "
                    f"{type(module).__qualname__}. Make the module a titan_models.Layer and add {name!r} to its "
                    "initializers()."
                )
            if parameter.is_meta:
                raise ValueError(
                    f"Parameters must have memory to be initialized, got {full_name} on the meta device. Call "
                    "model.to_empty(device=...) first."
                )
            local, offsets = local_shard(parameter)
            location = ShardLocation(key_of(seed, full_name), tuple(parameter.shape), offsets, _layer_of(full_name))
            initializers[name].fill_(local, location)


def _layer_of(name: str) -> int | None:
    """Return the layer number in the name of a parameter: 3 for `layers.3.attention.q_proj.weight`."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)
