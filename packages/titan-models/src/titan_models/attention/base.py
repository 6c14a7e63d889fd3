"""What every attention of a block offers: one of grouped queries, of latents, or of your own."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from torch import Tensor

from titan_models.attention.kernels import AttentionCore, Sdpa
from titan_models.attention.mask import Mask, MaskModifier
from titan_models.layers.layer import Layer
from titan_models.layers.roles import Roles


class Places(NamedTuple):
    """Where the tokens of a forward stand. B batch, T tokens, K features that rotate."""

    positions: Tensor
    """[B, T] integers, which restart with each document."""

    cos: Tensor
    """[B, T, 1, K/2], from `Rope`."""

    sin: Tensor
    """[B, T, 1, K/2], from `Rope`."""

    softmax_factor: float = 1.0
    """From `Rope`, for attentions whose softmax scale is multiplied by it."""


class Attention(Layer, abc.ABC):
    """Self-attention of a block; built with `dim`, the width of the stream."""

    class Config(Layer.Config):
        num_heads: int
        """Query heads."""

        mask_modifiers: list[MaskModifier.Config] = []
        """What a query does not see of its own document's past: none, or all keys that any of these leaves out."""

        core: AttentionCore.Config = Sdpa.Config()
        """The kernel."""

        @abc.abstractmethod
        def rotated_dim(self) -> int | None:
            """Features of a head that `Rope` rotates; None: there are none."""

    def __init__(self, config: Config) -> None:
        """Call it from your own, after that of `nn.Module`."""
        self.core: AttentionCore = config.core.build()
        self.mask_modifiers: tuple[MaskModifier, ...] = tuple(limit.build() for limit in config.mask_modifiers)
        self.mask_kind = repr((config.core, config.mask_modifiers))
        """Layers in which it is the same share a built_mask mask."""

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor, places: Places, mask: Any) -> Tensor:
        """`[B, T, D] -> [B, T, D]`; `mask` is what `core.build_mask` made of it."""

    @abc.abstractmethod
    def roles(self) -> Roles:
        """What each part is; see `titan_models.layers.roles`."""


class Masks:
    """What cores make of the masks of one forward: the layers that see the same share one."""

    def __init__(self, positions: Tensor, documents: Tensor | None) -> None:
        """Both `[B, T]`; see `Mask.causal`."""
        self._positions, self._documents = positions, documents
        self._built_mask: dict[str, Any] = {}

    def of(self, attention: Attention) -> Any:
        """The mask of a layer, as its core wants it."""
        if attention.mask_kind not in self._built_mask:
            mask = Mask.causal(self._positions, self._documents, attention.mask_modifiers)
            self._built_mask[attention.mask_kind] = attention.core.build_mask(mask)
        return self._built_mask[attention.mask_kind]
