"""Steps from the layout of own weights to that in Hugging Face's files, each with the way back."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor


class LayoutTransform(abc.ABC):
    """A change of layout that loses nothing: `from_hf` undoes `to_hf`, number for number.

    Both take and give lists: a rule may join several own weights to one of Hugging Face's. They take every dtype, and
    tensors on the meta device. One of your own is a subclass, and an argument of `HfTensor`.
    """

    @abc.abstractmethod
    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        """A step from own weights towards Hugging Face's. Raises ValueError for shapes that it cannot take."""

    @abc.abstractmethod
    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same step back."""


@dataclass(frozen=True)
class Transposed(LayoutTransform):
    """The last two dims are swapped: a projection is `[in, out]`, to be applied as `x @ W`."""

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.mT for tensor in tensors]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.mT for tensor in tensors]


@dataclass(frozen=True)
class Halves(LayoutTransform):
    """Two weights are one, the first before the second in `dim`, counted from the end: gate and up as `gate_up`."""

    dim: int

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(_pair(tensors, self), dim=self.dim)]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(_even(tensors, self, self.dim).chunk(2, dim=self.dim))


@dataclass(frozen=True)
class Alternating(LayoutTransform):
    """Two weights are one, in which they take turns in `dim`, counted from the end: gate and up of GPT-OSS."""

    dim: int

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        first, _ = _pair(tensors, self)
        dim = self.dim % first.dim()
        return [torch.stack(tensors, dim=dim + 1).flatten(dim, dim + 1)]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        tensor = _even(tensors, self, self.dim)
        dim = self.dim % tensor.dim()
        return list(tensor.unflatten(dim, (-1, 2)).unbind(dim + 1))


@dataclass(frozen=True)
class NeighborPairs(LayoutTransform):
    """Rows of queries or keys, for a rope that turns neighbors: 2i with 2i + 1, where own ones turn i with i + K/2.

    Rows are heads of `head_dim` features. Weights `[H * head_dim, D]` and biases `[H * head_dim]` alike.
    """

    head_dim: int

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._turn(tensor, (2, -1)) for tensor in tensors]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._turn(tensor, (-1, 2)) for tensor in tensors]

    def _turn(self, tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
        if tensor.shape[0] % self.head_dim:
            raise ValueError(
                f"Got {tensor.shape[0]} rows in heads of {self.head_dim} features. Rows are whole heads. Give "
                "NeighborPairs the head_dim of these weights."
            )
        return tensor.unflatten(0, (-1, self.head_dim)).unflatten(1, pairs).transpose(1, 2).flatten(0, 2)


def _pair(tensors: list[Tensor], step: LayoutTransform) -> list[Tensor]:
    if len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
        raise ValueError(
            f"Got tensors of shapes {[list(tensor.shape) for tensor in tensors]} for {step}. It joins two of one "
            "shape. Correct the rule."
        )
    return tensors


def _even(tensors: list[Tensor], step: LayoutTransform, dim: int) -> Tensor:
    if len(tensors) != 1 or tensors[0].shape[dim] % 2:
        raise ValueError(
            f"Got tensors of shapes {[list(tensor.shape) for tensor in tensors]} to take apart by {step}. It takes "
            "one, of even size there. Correct the rule."
        )
    return tensors[0]
