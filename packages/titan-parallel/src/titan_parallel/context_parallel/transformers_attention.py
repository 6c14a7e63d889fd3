"""Context parallelism for models of transformers, through its AttentionInterface and AttentionMaskInterface.

B batch, T tokens, t tokens of one rank, S keys, H heads, K features of a head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn
from torch.nn import functional

from titan_parallel._transformers import is_transformers_model
from titan_parallel.context_parallel.attention_kernel import AttentionKernel, Method
from titan_parallel.context_parallel.math_attention import explicit_attention
from titan_parallel.context_parallel.ring import Ring
from titan_parallel.context_parallel.sequence_sharding import ContextShards

POSITIONS = "titan_parallel_positions"
"""An additional model input: positions in the whole sequence, from which documents can be derived."""

_numbers = itertools.count()


class HuggingFaceAttention:
    """A context-parallel attention implementation for a model of transformers, with the inputs that it needs.

    It replaces the model's own implementation only while a step runs. Masks come from the mask functions of
    transformers, which take the indices of queries and keys. Attention is computed with PyTorch's SDPA, or with
    `explicit_attention` if scores are soft-capped.
    """

    def __init__(self, model: nn.Module, shards: ContextShards, method: Method) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        _require_one_sequence_of_tokens(model)
        self._shards, self._method = shards, method
        self._positions: Tensor | None = None
        self._name = f"titan_parallel_{next(_numbers)}"
        AttentionInterface.register(self._name, self._attend)
        AttentionMaskInterface.register(self._name, self._build_mask)
        self._configs = _configs_that_take(model, self._name)
        model.forward = self._without_positions(model.forward)

    def turn(self, on: bool) -> None:
        """Switch the model to this attention implementation, or back to its own."""
        for config, own in self._configs:
            config._attn_implementation_internal = self._name if on else own

    def local(self, inputs: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """Return this rank's tokens with their positions, and the padding mask and positions of the whole sequence.

        As in transformers, positions that start again begin a new document, unless there is a padding mask.
        """
        tokens = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs)
        whole = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
        line = torch.arange(tokens.size(1), device=tokens.device)
        whole["position_ids"] = inputs.get("position_ids", line[None]).expand(tokens.shape[:2])
        local = self._shards.local_tensors(whole, {**sequence_dims, "position_ids": 1})
        padding = inputs.get("attention_mask")
        if padding is None:
            local[POSITIONS] = whole["position_ids"]
            padding = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return {**local, "attention_mask": padding.bool()}  # whole, so that transformers derives no documents from it

    def _without_positions(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def forward_of_model(*args: Any, **kwargs: Any) -> Any:
            self._positions = kwargs.pop(POSITIONS, None)
            return forward(*args, **kwargs)

        return forward_of_model

    def _build_mask(
        self,
        *,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Tensor],
        attention_mask: Tensor | None,
        allow_is_causal_skip: bool = True,
        use_vmap: bool = False,
        **_: Any,
    ) -> BuiltMask:
        """Build a mask for transformers, which calls this function; the model passes the result to its attentions."""
        if attention_mask is None or use_vmap or not allow_is_causal_skip:
            raise ValueError(
                "context_parallel_degree must be 1 for a model that combines its causal mask with another one (such as "
                f"bidirectional blocks), got {self._shards.axis.size}: the other mask would see the indices of one "
                "rank's tokens only."
            )
        mask = self._mask(mask_function, attention_mask, makes_documents=kv_length != q_length)
        return BuiltMask(self._method.build_mask(_build_mask_for_sdpa, mask))

    def _mask(self, mask_function: Callable[..., Tensor], padding: Tensor, *, makes_documents: bool) -> PositionsMask:
        """Return the mask description of this rank's tokens. A model that fills a cache has no documents."""
        positions = torch.arange(padding.size(1), device=padding.device).expand(padding.shape)
        query_documents = key_documents = None
        if self._positions is None:  # padded keys are in a document without queries
            query_documents, key_documents = torch.zeros_like(positions), padding.long() - 1
        elif makes_documents and (documents := _documents(self._positions)).any():
            positions, query_documents, key_documents = self._positions, documents, documents
        local = {id(x): self._shards.local(x, 1) for x in (positions, query_documents, key_documents) if x is not None}
        return PositionsMask(
            local[id(positions)],
            local[id(positions)],
            local.get(id(query_documents)),
            local.get(id(key_documents)),
            mask_function,
        )

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Compute attention for transformers: takes `[B, H, t, K]`, returns `[B, t, H, K]`. Windows are in the mask."""
        if not isinstance(attention_mask, BuiltMask) or position_bias is not None:
            raise ValueError(
                "context_parallel_degree must be 1 for attention with a position bias, or with a mask that is not from "
                f"the masking functions of transformers, got {self._shards.axis.size} for {type(module).__name__}."
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = q.size(-1) ** -0.5 if scaling is None else scaling
        kernel = AttentionKernel(
            functools.partial(_attention, scale=scale, softcap=softcap, dropout=dropout),
            functools.partial(explicit_attention, scale=scale, softcap=softcap, dropout=dropout),
            s_aux,
        )
        if dropout and isinstance(self._method, Ring):
            raise ValueError(
                f"Attention dropout must be 0 with context_parallel_method ring, got {dropout}: the ring recomputes "
                "attention in the backward, with another random mask. Use the method gather."
            )
        return self._method.attend(kernel, q, k, v, attention_mask.mask), None


@dataclass(frozen=True)
class BuiltMask:
    """A mask of this package, opaque to transformers."""

    mask: Any


@dataclass(frozen=True)
class PositionsMask:
    """A mask description of transformers: a mask function of the positions of queries and keys, within documents."""

    query_positions: Tensor
    key_positions: Tensor
    query_documents: Tensor | None
    key_documents: Tensor | None
    mask_function: Callable[..., Tensor]
    """The mask function: (batch index, head index, query position, key position) to bool, on tensors that broadcast."""

    def visible(self) -> Tensor:
        """Return [B, T, S] bool, true where a query sees a key."""
        samples = torch.arange(len(self.query_positions), device=self.query_positions.device)[:, None, None]
        visible = self.mask_function(
            samples, torch.zeros_like(samples), self.query_positions[:, :, None], self.key_positions[:, None, :]
        )
        if self.query_documents is not None and self.key_documents is not None:
            visible = visible & (self.query_documents[:, :, None] == self.key_documents[:, None, :])
        return visible

    @property
    def only_causal(self) -> bool:
        """The mask is plain causal: queries and keys are the same tokens, without documents or windows."""
        from transformers import masking_utils

        causal: Any = masking_utils.causal_mask_function
        return (
            self.mask_function is causal and self.query_documents is None and self.query_positions is self.key_positions
        )


def _build_mask_for_sdpa(mask: PositionsMask) -> Tensor | None:
    return None if mask.only_causal else mask.visible()[:, None]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    if softcap is not None:
        return explicit_attention(q, k, v, mask, scale, softcap=softcap, dropout=dropout)[0]
    output = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.size(2) != k.size(2),
    )
    return output.transpose(1, 2)


def _documents(positions_BT: Tensor) -> Tensor:
    """Return the document index of each token. A document begins where a position is not the previous one plus 1."""
    return (positions_BT.diff(dim=1, prepend=positions_BT[:, :1] - 1) != 1).cumsum(1)


def _require_one_sequence_of_tokens(model: Any) -> None:
    if model.config.is_encoder_decoder or model.main_input_name not in ("input_ids", "inputs_embeds"):
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else f"the input {model.main_input_name}"
        raise ConfigError(
            f"context_parallel_degree must be 1 for a model of transformers with {what}, got {type(model).__name__}. "
            "Only a single sequence of token ids can be split."
        )


def _configs_that_take(model: nn.Module, name: str) -> list[tuple[Any, str]]:
    """Return the configs of a model and its submodels, each with its attention implementation.

    Raises ConfigError for a model that does not support the attention interface.
    """
    models: list[Any] = [module for module in model.modules() if is_transformers_model(module)]
    configs = {id(module.config): (module.config, module.config._attn_implementation) for module in models}
    model.set_attn_implementation(name)  # type: ignore[operator]
    refused = {type(module).__name__ for module in models if module.config._attn_implementation != name}
    for config, own in configs.values():
        config._attn_implementation_internal = own
    if refused:
        raise ConfigError(
            "context_parallel_degree must be 1 for a model that does not use the attention interface of transformers, "
            f"got {', '.join(sorted(refused))}."
        )
    return list(configs.values())
