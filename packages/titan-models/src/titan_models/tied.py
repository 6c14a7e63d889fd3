"""What reads the embedding's weight besides the embedding."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from titan_models.embedding import Embedding
from titan_models.part import Part


class Tied(Part, abc.ABC):
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
