"""The interface of attention layers, and the inputs that all blocks share: rotary positions and masks."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from torch import Tensor

from titan_models.attention.kernels import AttentionCore, Sdpa
from titan_models.attention.mask import Mask, MaskModifier
from titan_models.layers.layer import Layer
from titan_models.layers.roles import Roles


class RotaryPositions(NamedTuple):
    """The positions of the tokens, with the rotations that follow. B batch, T tokens, K rotary features of a head."""

    positions: Tensor
    """[B, T] integers; they restart with each document."""

    cos: Tensor
    """[B, T, 1, K/2], returned by `Rope`."""

    sin: Tensor
    """[B, T, 1, K/2], returned by `Rope`."""

    softmax_factor: float = 1.0
    """Attribute of `Rope`: the factor of the softmax scale, for attention that applies it."""


class Attention(Layer, abc.ABC):
    """The self-attention of a block; built with `dim`, the width of the hidden states."""

    class Config(Layer.Config):
        num_heads: int
        """Number of query heads."""

        mask_modifiers: list[MaskModifier.Config] = []
        """Restrictions of the causal mask, such as `SlidingWindow`: a query sees the keys that all of them keep."""

        core: AttentionCore.Config = Sdpa.Config()
        """The attention kernel."""

        @abc.abstractmethod
        def rotated_dim(self) -> int | None:
            """Return the number of features of a head that `Rope` rotates. None: no rotary positions."""

    def __init__(self, config: Config) -> None:
        """Build the core and the mask modifiers. Subclasses call it after `nn.Module.__init__`."""
        self.core: AttentionCore = config.core.build()
        self.mask_modifiers: tuple[MaskModifier, ...] = tuple(modifier.build() for modifier in config.mask_modifiers)
        self.mask_key = repr((config.core, config.mask_modifiers))
        """Layers with the same key share one built mask."""

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor, rotary: RotaryPositions, mask: Any) -> Tensor:
        """Map hidden states `[B, T, D]` to `[B, T, D]`; `mask` is the output of `core.build_mask`."""

    @abc.abstractmethod
    def roles(self) -> Roles:
        """Return the role of each module; see `titan_models.layers.roles`."""


class MaskCache:
    """The masks of one forward, built once for all layers with equal `mask_key`."""

    def __init__(self, positions: Tensor, documents: Tensor | None) -> None:
        """Keep `positions` and `documents`, both `[B, T]`; see `Mask.causal`."""
        self._positions, self._documents = positions, documents
        self._built_masks: dict[str, Any] = {}

    def get(self, attention: Attention) -> Any:
        """Return the mask of a layer, built by its core."""
        if attention.mask_key not in self._built_masks:
            mask = Mask.causal(self._positions, self._documents, attention.mask_modifiers)
            self._built_masks[attention.mask_key] = attention.core.build_mask(mask)
        return self._built_masks[attention.mask_key]
