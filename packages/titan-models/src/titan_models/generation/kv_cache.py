"""Keys and values that are kept from call to call, so that a token is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from titan_models.attention.kernels import AttentionCore
from titan_models.attention.mask import Mask

_NOBODY = -1
"""The document of places that hold no token yet: no query belongs to it."""


class KVCache:
    """What the attention cores of a model have seen; all of it, whatever a layer's mask_modifiers leave of it.

    While `extend` calls the model, keys and values of a core are those of this call and of all before. It is done at
    the cores alone, by the description of the mask: every family, attention and mask works, one of your own too.
    B rows, T tokens of a call, S places, V vocabulary.
    """

    def __init__(self, model: nn.Module, *, rows: int, capacity: int) -> None:
        """For `capacity` tokens of each row. The model, called with `tokens, positions, document_ids`, stays as it is.

        Raises ValueError for a model without attention cores.
        """
        self._model = model
        self._cores = [module for module in model.modules() if isinstance(module, AttentionCore)]
        if not self._cores:
            raise ValueError(
                f"Got a {type(model).__qualname__} without an AttentionCore. Keys and values are kept where these are "
                "called. Let its attention call one."
            )
        device = next(model.parameters()).device
        self._positions_BS = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        self._documents_BS = torch.full_like(self._positions_BS, _NOBODY)
        self._kept: dict[AttentionCore, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def extend(self, tokens_BT: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Logits `[B, T, V]` of the next tokens, which see those of earlier calls. Document ids are 0 or more.

        Raises ValueError for more tokens than there is room for.
        """
        end = self._length + tokens_BT.shape[1]
        if end > self._positions_BS.shape[1]:
            raise ValueError(
                f"Got {end} tokens in all for a cache of capacity {self._positions_BS.shape[1]}. It was made for so "
                "many. Make one with more."
            )
        self._positions_BS[:, self._length : end] = positions_BT
        self._documents_BS[:, self._length : end] = document_ids_BT
        with ExitStack() as stack:
            for core in self._cores:
                methods = {"build_mask": self._build_mask_with(core.build_mask), "forward": self._attend_with(core)}
                stack.enter_context(_replaced(core, methods))
            logits: Tensor = self._model(tokens_BT, positions_BT, document_ids_BT)
        self._length = end
        return logits

    def _build_mask_with(self, build_mask: Callable[[Mask], Any]) -> Callable[[Mask], Any]:
        """Keys of a mask are those of all calls."""
        return lambda mask: build_mask(
            replace(mask, key_positions=self._positions_BS, key_documents=self._documents_BS)
        )

    def _attend_with(self, core: AttentionCore) -> Callable[..., Tensor]:
        attend = core.forward

        def forward(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *rest: Any) -> Tensor:
            if core not in self._kept:
                self._kept[core] = self._room_for(k_BTGK), self._room_for(v_BTGV)
            for kept, new in zip(self._kept[core], (k_BTGK, v_BTGV), strict=True):
                kept[:, self._length : self._length + new.shape[1]] = new
            return attend(q_BTHK, *self._kept[core], *rest)

        return forward

    def _room_for(self, x_BTGK: Tensor) -> Tensor:
        return x_BTGK.new_zeros(*self._positions_BS.shape, *x_BTGK.shape[2:])


@contextmanager
def _replaced(module: nn.Module, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """The module with other methods for a while; what it had, its class's or its own, comes back."""
    own = vars(module)
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)
