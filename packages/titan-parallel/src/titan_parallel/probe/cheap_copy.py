"""A stand-in for a whole model that costs next to nothing: real code, made-up weights, on the CPU.

A probe runs it on a few tokens. Small weights are the model's own with noise added, so that a gate of zeros hides
nothing; those of large parameters, or on meta, are made up and share memory; large projections are replaced by a cheap
function of each token. T tokens, I and O features.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

LARGE = 2**20
"""Numbers in a parameter above which it gets no memory of its own."""
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def cheap_copy(model: nn.Module, projections: Collection[str]) -> nn.Module:
    """Return a copy of `model` in eval mode and in the default dtype; `projections` are modules known to be matrices.

    Raises whatever `copy.deepcopy` does for a model that cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, object] = {}
    large: dict[torch.Size, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_weight(parameter, large, generator), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _buffer(buffer, generator)
    copied = copy.deepcopy(model, memo).eval()
    for name, module in copied.named_modules():
        weight = module._parameters.get("weight")
        is_matrix = type(module).forward is nn.Linear.forward or name in projections
        if is_matrix and weight is not None and weight.dim() == 2 and weight.numel() > LARGE:
            module.forward = _Projection(weight)
    return copied


def sharing_weights(copied: nn.Module) -> nn.Module:
    """Return a copy of a copy: the same parameters and large buffers, and all else its own."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in copied.parameters()}
    memo |= {id(buffer): buffer for buffer in copied.buffers() if buffer.numel() > LARGE}
    return copy.deepcopy(copied, memo)


def let_train(copied: nn.Module) -> None:
    """Put a copy into train mode, but for modules of dropout."""
    copied.train()
    for module in copied.modules():
        if isinstance(module, _DROPOUTS):
            module.eval()


class _Projection:
    """Takes the place of a large matrix product: each output feature is one of the input features."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self._sizes = {columns: rows, rows: columns}  # [O, I], or [I, O]

    def __call__(self, x: Tensor) -> Tensor:
        num_features = self._sizes[x.size(-1)]
        return x.repeat(*[1] * (x.dim() - 1), -(-num_features // x.size(-1)))[..., :num_features]


def _weight(parameter: nn.Parameter, large: dict[torch.Size, Tensor], generator: torch.Generator) -> Tensor:
    """`large` are those made so far, one of each shape."""
    if not parameter.is_floating_point():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    scale = parameter.size(-1) ** -0.5 if parameter.dim() > 1 else 0.2
    if parameter.numel() > LARGE:
        if parameter.shape not in large:
            large[parameter.shape] = _shared(parameter.shape, scale, generator)
        return large[parameter.shape]
    noise = torch.randn(parameter.shape, generator=generator) * scale
    if parameter.is_meta or type(parameter.data) is not Tensor:
        return noise if parameter.dim() > 1 else noise + 0.5
    return parameter.detach().to("cpu", noise.dtype) + 0.5 * noise


def _shared(shape: torch.Size, scale: float, generator: torch.Generator) -> Tensor:
    """Random weights whose matrices all are one, and whose rows are windows of one row."""
    if len(shape) > 2:
        return (torch.randn(shape[1:], generator=generator) * scale).expand(shape)
    row = torch.randn(sum(shape), generator=generator) * scale
    return row.as_strided(shape, (1,) * len(shape))


def _buffer(buffer: Tensor, generator: torch.Generator) -> Tensor:
    if not buffer.is_meta and type(buffer.data) is Tensor:
        value = buffer.detach().to("cpu", copy=True)
        return value.to(torch.get_default_dtype()) if value.is_floating_point() else value
    if buffer.is_floating_point():
        return torch.rand(buffer.shape, generator=generator)
    return torch.zeros(buffer.shape, dtype=buffer.dtype)
