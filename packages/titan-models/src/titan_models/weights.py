"""Initial weights of a whole model, from one seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_models.initialization.counter_based_rng import Place, key_of
from titan_models.initialization.local_shard import local_part
from titan_models.layers.layer import Layer


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Draw every parameter of `model` in place, from generators keyed by (seed, its fully qualified name, place in it).

    The parameters have memory, on any device and in any dtype, plain or `DTensor`: whatever the sharding, the whole
    tensor has the same bits. A tied parameter is drawn once, by the first name it has. Buffers that are
    state get their first values, too. Raises ValueError for what nobody has an initializer for, and for what is on the
    meta device.
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
                    f"Got the parameter or buffer {full_name} of a {type(module).__qualname__}. Each needs an "
                    "initializer. Make its module a titan_models.Layer whose initializers() names it."
                )
            if parameter.is_meta:
                raise ValueError(
                    f"Got the parameter {full_name} on the meta device. It needs memory to be initialized. Call "
                    "model.to_empty(device=...) first."
                )
            local, offsets = local_part(parameter)
            place = Place(key_of(seed, full_name), tuple(parameter.shape), offsets, _layer_of(full_name))
            initializers[name].fill_(local, place)


def _layer_of(name: str) -> int | None:
    """The number of the layer that a parameter is in: `layers.3.attention.q_proj.weight` is in layer 3."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)
