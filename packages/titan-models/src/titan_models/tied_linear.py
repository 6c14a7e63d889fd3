"""A projection to the vocabulary whose weight is the embedding's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titan_config import Configurable
from torch import Tensor, nn

from titan_models.embedding import Embedding
from titan_models.flops import Flops, matmul_flops
from titan_models.part import Part


class TiedLinear(Part, nn.Linear):
    """`y = x W^T` with the embedding's `W`: one parameter, known by the embedding's name.

    The two stay one through `to_empty` and `to`, where PyTorch would part them, and `state_dict` holds the weight once.
    """

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = embedding.weight.shape
        self.weight = embedding.weight
        self.register_parameter("bias", None)
        self._embedding = (embedding,)  # in a tuple, so that it is no child

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.in_features * self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedLinear:
        self.weight = self._embedding[0].weight  # which had its turn before
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        *_, unexpected_keys, _ = args
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix))
