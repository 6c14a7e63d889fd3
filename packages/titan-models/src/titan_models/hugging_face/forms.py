"""How the numbers of a weight are held in a checkpoint."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

from torch import Tensor

from titan_models.hugging_face.pieces import Piece


class Form(abc.ABC):
    """One tensor, or quantised numbers and their factors."""

    @abc.abstractmethod
    def shape(self, *parts: Tensor) -> tuple[int, ...]:
        """The shape of the numbers. Raises ValueError for parts that do not fit together."""

    @abc.abstractmethod
    def find(self, piece: Piece, names: tuple[str, ...], shape: tuple[int, ...]) -> list[Piece]:
        """A piece whose one tensor is held in this form under `names`; several where it can be read in parts."""


@dataclass(frozen=True)
class Plain(Form):
    """A tensor as it is."""

    def shape(self, *parts: Tensor) -> tuple[int, ...]:
        (tensor,) = parts
        return tuple(tensor.shape)

    def find(self, piece: Piece, names: tuple[str, ...], shape: tuple[int, ...]) -> list[Piece]:
        return [replace(piece, hf_names=names)]
