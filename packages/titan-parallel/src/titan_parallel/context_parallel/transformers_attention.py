"""Context parallel for models of transformers, through its interfaces of attention and of masks.

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
"""An input beside the model's own: positions in the whole sequence, where they may tell documents apart."""

_numbers = itertools.count()


class HuggingFaceAttention:
    """An attention implementation of transformers that shares sequences, and what the model must be given for it.

    The model's own implementation is back in place whenever no step runs. Masks are taken as the functions of places
    that transformers makes them of. Attention is PyTorch's fused one, or explicit where scores are capped.
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
        """Put this implementation in place of the model's own, or take it away."""
        for config, own in self._configs:
            config._attn_implementation_internal = self._name if on else own

    def local(self, inputs: Mapping[str, Tensor], sequence_dims: Mapping[str, int]) -> dict[str, Tensor]:
        """This rank's tokens with their positions in the whole sequence, and what describes the whole sequence.

        Positions that start again tell documents apart, as in transformers, unless there is a padding mask.
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
        return {**local, "attention_mask": padding.bool()}  # whole: transformers guesses no documents from a part

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
        """What transformers calls to make a mask; the model hands what is returned to each of its attentions."""
        if attention_mask is None or use_vmap or not allow_is_causal_skip:
            raise ValueError(
                "Got a model that overlays its causal mask with another (such as blocks that see both ways), under "
                "context_parallel_degree > 1. Its places are those of one rank's tokens. Set the degree to 1."
            )
        mask = self._mask(mask_function, attention_mask, makes_documents=kv_length != q_length)
        return BuiltMask(self._method.build_mask(_build_mask_for_sdpa, mask))

    def _mask(self, rule: Callable[..., Tensor], padding: Tensor, *, makes_documents: bool) -> PlacesMask:
        """What this rank's tokens see of each other. A model that fills a cache makes no documents."""
        positions = torch.arange(padding.size(1), device=padding.device).expand(padding.shape)
        query_documents = key_documents = None
        if self._positions is None:  # there is padding: no document, so that no query sees it
            query_documents, key_documents = torch.zeros_like(positions), padding.long() - 1
        elif makes_documents and (documents := _documents(self._positions)).any():
            positions, query_documents, key_documents = self._positions, documents, documents
        local = {id(x): self._shards.local(x, 1) for x in (positions, query_documents, key_documents) if x is not None}
        return PlacesMask(
            local[id(positions)],
            local[id(positions)],
            local.get(id(query_documents)),
            local.get(id(key_documents)),
            rule,
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
        """What transformers calls for `[B, H, t, K]`; returns `[B, t, H, K]`. Windows are in the mask."""
        if not isinstance(attention_mask, BuiltMask) or position_bias is not None:
            raise ValueError(
                f"Got a {type(module).__name__} whose mask is not made by transformers' masking functions, or with a "
                "position bias, under context_parallel_degree > 1. Neither can be split. Set the degree to 1."
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
                f"Got attention dropout {dropout} under context_parallel_method ring. A ring computes attention again "
                "in the backward, and would drop others. Set the dropout to 0, or the method to gather."
            )
        return self._method.attend(kernel, q, k, v, attention_mask.mask), None


@dataclass(frozen=True)
class BuiltMask:
    """A mask that this package made, and nobody else can read."""

    mask: Any


@dataclass(frozen=True)
class PlacesMask:
    """A mask of transformers: a rule of the places of queries and keys, within documents."""

    query_positions: Tensor
    key_positions: Tensor
    query_documents: Tensor | None
    key_documents: Tensor | None
    rule: Callable[..., Tensor]
    """(row, head, query's place, key's place) to bool, all integer tensors that broadcast."""

    def visible(self) -> Tensor:
        """[B, T, S] bool."""
        rows = torch.arange(len(self.query_positions), device=self.query_positions.device)[:, None, None]
        visible = self.rule(
            rows, torch.zeros_like(rows), self.query_positions[:, :, None], self.key_positions[:, None, :]
        )
        if self.query_documents is not None and self.key_documents is not None:
            visible = visible & (self.query_documents[:, :, None] == self.key_documents[:, None, :])
        return visible

    @property
    def only_causal(self) -> bool:
        """Whether queries are keys, in order, and nothing but order limits what they see."""
        from transformers import masking_utils

        causal: Any = masking_utils.causal_mask_function
        return self.rule is causal and self.query_documents is None and self.query_positions is self.key_positions


def _build_mask_for_sdpa(mask: PlacesMask) -> Tensor | None:
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
    """Which document of its row each token is in: one begins where a position does not follow the one before."""
    return (positions_BT.diff(dim=1, prepend=positions_BT[:, :1] - 1) != 1).cumsum(1)


def _require_one_sequence_of_tokens(model: Any) -> None:
    if model.config.is_encoder_decoder or model.main_input_name not in ("input_ids", "inputs_embeds"):
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else f"the input {model.main_input_name}"
        raise ConfigError(
            f"context_parallel_degree must be 1 for a model of transformers with {what}, got {type(model).__name__}. "
            "Context parallel shares one sequence of token ids. Set context_parallel_degree to 1."
        )


def _configs_that_take(model: nn.Module, name: str) -> list[tuple[Any, str]]:
    """The configs of a model and its parts, each with its implementation. Raises ConfigError where one refuses."""
    parts: list[Any] = [part for part in model.modules() if is_transformers_model(part)]
    configs = {id(part.config): (part.config, part.config._attn_implementation) for part in parts}
    model.set_attn_implementation(name)  # type: ignore[operator]
    refused = {type(part).__name__ for part in parts if part.config._attn_implementation != name}
    for config, own in configs.values():
        config._attn_implementation_internal = own
    if refused:
        raise ConfigError(
            f"Got context_parallel_degree > 1 for {', '.join(sorted(refused))}, which computes attention by itself. "
            "Context parallel goes through the attention interface of transformers, and this model does not call it. "
            "Set context_parallel_degree to 1, or take another model."
        )
    return list(configs.values())
