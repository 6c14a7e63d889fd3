"""Modules that share the weight of the embedding: a second lookup, and a projection to the vocabulary."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Self

from titan_config import Configurable
from torch import Tensor, nn
from torch.nn import functional

from titan_models.layers.embedding import Embedding
from titan_models.layers.flops import Flops, matmul_flops
from titan_models.layers.layer import Layer


class Tied(Layer, abc.ABC):
    """A module whose weight is the embedding's: one parameter, known by the embedding's name.

    The two stay one through `to_empty` and `to`, where PyTorch would part them, and `state_dict` holds the weight once.
    """

    def tie(self, embedding: Embedding) -> None:
        """Call it from `__init__`, after that of `nn.Module`."""
        self.register_parameter("weight", embedding.weight)
        self._embedding = (embedding,)  # in a tuple, so that it is no child

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.register_parameter("weight", self._embedding[0].weight)  # which had its turn before
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        *_, unexpected_keys, _ = args
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix))


class TiedEmbedding(Tied):
    """Row `token` of the embedding's table: a module of its own, for a stage that does not hold the embedding."""

    weight: nn.Parameter

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.tie(embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight)

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)


class TiedLinear(Tied, nn.Linear):
    """`y = x W^T` with the embedding's `W`."""

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = embedding.weight.shape
        self.tie(embedding)
        self.register_parameter("bias", None)

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.in_features * self.out_features)
