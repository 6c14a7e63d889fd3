"""The KV cache for generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from titan_models.attention.kernels import AttentionCore
from titan_models.attention.mask import Mask

_EMPTY = -1
"""The document id of empty cache slots; no query has it."""


class KVCache:
    """The keys and values of each attention core of a model, for all tokens of all calls.

    During `extend` each core attends to the keys and values of this call and of all earlier calls. Only the cores and
    the description of the mask are changed, so that each model family, attention and mask works, custom ones included.
    Tokens outside of a sliding window or chunk are kept too. B sequences, T tokens of a call, S slots, V vocabulary.
    """

    def __init__(self, model: nn.Module, *, batch_size: int, capacity: int) -> None:
        """Allocate a cache of `capacity` tokens for each of `batch_size` sequences.

        The model is called with `tokens, positions, document_ids` and is not modified. Raises ValueError for a model
        without attention cores.
        """
        self._model = model
        self._cores = [module for module in model.modules() if isinstance(module, AttentionCore)]
        if not self._cores:
            raise ValueError(
                f"A model with a KV cache must have a module of type AttentionCore, got a {type(model).__qualname__} "
                "without one."
            )
        device = next(model.parameters()).device
        self._positions_BS = torch.zeros(batch_size, capacity, dtype=torch.int64, device=device)
        self._documents_BS = torch.full_like(self._positions_BS, _EMPTY)
        self._keys_values: dict[AttentionCore, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def extend(self, tokens_BT: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of further tokens, which attend to the tokens of earlier calls.

        Document ids must be 0 or more. Raises ValueError if the tokens of all calls exceed the capacity.
        """
        end = self._length + tokens_BT.shape[1]
        if end > self._positions_BS.shape[1]:
            raise ValueError(
                f"KV cache overflow: the cache must hold {end} tokens per sequence, got capacity "
                f"{self._positions_BS.shape[1]}."
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
        """Return a `build_mask` whose keys are those of all calls."""
        return lambda mask: build_mask(
            replace(mask, key_positions=self._positions_BS, key_documents=self._documents_BS)
        )

    def _attend_with(self, core: AttentionCore) -> Callable[..., Tensor]:
        attend = core.forward

        def forward(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *rest: Any) -> Tensor:
            if core not in self._keys_values:
                self._keys_values[core] = self._empty_like(k_BTGK), self._empty_like(v_BTGV)
            for cache, new in zip(self._keys_values[core], (k_BTGK, v_BTGV), strict=True):
                cache[:, self._length : self._length + new.shape[1]] = new
            return attend(q_BTHK, *self._keys_values[core], *rest)

        return forward

    def _empty_like(self, x_BTGK: Tensor) -> Tensor:
        return x_BTGK.new_zeros(*self._positions_BS.shape, *x_BTGK.shape[2:])


@contextmanager
def _replaced(module: nn.Module, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace methods of a module within the context, and restore them after it."""
    attributes = vars(module)
    before = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(before)
