"""A cheap copy of a model of any size, for probes: the model's own code with synthetic weights, on the CPU.

A probe runs the copy on a few tokens. Small parameters are the model's own with noise added, so that a zero-initialized
gate does not hide what is behind it. Large parameters, and those on the meta device, are synthetic; large ones share
memory. Large projections are replaced by a cheap function of each token. T tokens, I and O features.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

LARGE = 2**20
"""Number of elements above which a parameter is large."""
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def cheap_copy(model: nn.Module, projections: Collection[str]) -> nn.Module:
    """Return a copy of `model` in eval mode and in the default dtype.

    `projections` names the modules that are known to be matrix products. Raises whatever `copy.deepcopy` raises for a
    model that cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, object] = {}
    large: dict[torch.Size, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_synthetic_weight(parameter, large, generator), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _copied_buffer(buffer, generator)
    copied = copy.deepcopy(model, memo).eval()
    for name, module in copied.named_modules():
        weight = module._parameters.get("weight")
        is_matrix = type(module).forward is nn.Linear.forward or name in projections
        if is_matrix and weight is not None and weight.dim() == 2 and weight.numel() > LARGE:
            module.forward = _CheapProjection(weight)
    return copied


def copy_sharing_weights(copied: nn.Module) -> nn.Module:
    """Return a copy of a cheap copy that shares its parameters and its large buffers; all other state is separate."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in copied.parameters()}
    memo |= {id(buffer): buffer for buffer in copied.buffers() if buffer.numel() > LARGE}
    return copy.deepcopy(copied, memo)


def set_train_mode_without_dropout(copied: nn.Module) -> None:
    """Put a cheap copy into train mode, with its dropout modules in eval mode."""
    copied.train()
    for module in copied.modules():
        if isinstance(module, _DROPOUTS):
            module.eval()


class _CheapProjection:
    """A stand-in for a large matrix product: each output feature is a copy of one of the input features."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self._output_sizes = {columns: rows, rows: columns}  # the weight may be [O, I] or [I, O]

    def __call__(self, x: Tensor) -> Tensor:
        num_features = self._output_sizes[x.size(-1)]
        return x.repeat(*[1] * (x.dim() - 1), -(-num_features // x.size(-1)))[..., :num_features]


def _synthetic_weight(parameter: nn.Parameter, large: dict[torch.Size, Tensor], generator: torch.Generator) -> Tensor:
    """Return the weight for the copy. `large` holds the large weights made so far, one for each shape."""
    if not parameter.is_floating_point():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    scale = parameter.size(-1) ** -0.5 if parameter.dim() > 1 else 0.2
    if parameter.numel() > LARGE:
        if parameter.shape not in large:
            large[parameter.shape] = _overlapping_weight(parameter.shape, scale, generator)
        return large[parameter.shape]
    noise = torch.randn(parameter.shape, generator=generator) * scale
    if parameter.is_meta or type(parameter.data) is not Tensor:
        return noise if parameter.dim() > 1 else noise + 0.5
    return parameter.detach().to("cpu", noise.dtype) + 0.5 * noise


def _overlapping_weight(shape: torch.Size, scale: float, generator: torch.Generator) -> Tensor:
    """Return random weights in little memory: rows are windows of one vector, stacked matrices are the same matrix."""
    if len(shape) > 2:
        return (torch.randn(shape[1:], generator=generator) * scale).expand(shape)
    vector = torch.randn(sum(shape), generator=generator) * scale
    return vector.as_strided(shape, (1,) * len(shape))


def _copied_buffer(buffer: Tensor, generator: torch.Generator) -> Tensor:
    if not buffer.is_meta and type(buffer.data) is Tensor:
        value = buffer.detach().to("cpu", copy=True)
        return value.to(torch.get_default_dtype()) if value.is_floating_point() else value
    if buffer.is_floating_point():
        return torch.rand(buffer.shape, generator=generator)
    return torch.zeros(buffer.shape, dtype=buffer.dtype)
