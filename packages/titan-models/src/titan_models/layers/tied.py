"""Modules tied to the weight of the embedding: a second lookup and a projection to the vocabulary."""

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
    """A module that shares the weight of the embedding: one parameter, with the name that it has in the embedding.

    The weight stays tied through `to` and `to_empty`, which would untie it in PyTorch, and `state_dict` holds it once.
    """

    def tie(self, embedding: Embedding) -> None:
        """Share the weight of `embedding`. To be called in `__init__`, after `nn.Module.__init__`."""
        self.register_parameter("weight", embedding.weight)
        self._embedding = (embedding,)  # in a tuple, so that nn.Module does not register a child

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.register_parameter("weight", self._embedding[0].weight)  # `_apply` of the embedding ran before
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        *_, unexpected_keys, _ = args
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix))


class TiedEmbedding(Tied):
    """Token embedding with the weight of another one, for a pipeline stage that does not hold the first."""

    weight: nn.Parameter

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.tie(embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight)

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)


class TiedLinear(Tied, nn.Linear):
    """`y = x W^T` with the weight `W` of the embedding."""

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = embedding.weight.shape
        self.tie(embedding)
        self.register_parameter("bias", None)

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.in_features * self.out_features)
