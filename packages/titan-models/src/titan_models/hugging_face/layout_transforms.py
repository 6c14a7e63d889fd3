"""Invertible layout transforms from weights of a model to tensors of a Hugging Face checkpoint."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor


class LayoutTransform(abc.ABC):
    """An invertible change of layout: `from_hf` undoes `to_hf` exactly.

    Both map lists to lists, since a rule may join several weights into one tensor. They must support all dtypes and
    tensors on the meta device. A custom transform is a subclass, passed to `HfTensor`.
    """

    @abc.abstractmethod
    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        """Transform weights of the model towards Hugging Face layout. Raises ValueError for unsupported shapes."""

    @abc.abstractmethod
    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        """Invert `to_hf`."""


@dataclass(frozen=True)
class Transposed(LayoutTransform):
    """Swap the last two dims: the checkpoint stores projections as `[in, out]`, for `x @ W`."""

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.mT for tensor in tensors]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.mT for tensor in tensors]


@dataclass(frozen=True)
class Halves(LayoutTransform):
    """Concatenate two weights along `dim` (negative), such as gate and up projections to `gate_up_proj`."""

    dim: int

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(_check_pair(tensors, self), dim=self.dim)]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(_check_even(tensors, self, self.dim).chunk(2, dim=self.dim))


@dataclass(frozen=True)
class Alternating(LayoutTransform):
    """Interleave two weights along `dim` (negative), such as the gate and up projections of GPT-OSS."""

    dim: int

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        first, _ = _check_pair(tensors, self)
        dim = self.dim % first.dim()
        return [torch.stack(tensors, dim=dim + 1).flatten(dim, dim + 1)]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        tensor = _check_even(tensors, self, self.dim)
        dim = self.dim % tensor.dim()
        return list(tensor.unflatten(dim, (-1, 2)).unbind(dim + 1))


@dataclass(frozen=True)
class NeighborPairs(LayoutTransform):
    """Permute the rows of query or key projections for a RoPE that pairs features 2i and 2i + 1 (interleaved).

    The model pairs features i and i + K/2 of each head of K = `head_dim` features. For weights `[H * head_dim, D]` and
    biases `[H * head_dim]`.
    """

    head_dim: int

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._permute(tensor, (2, -1)) for tensor in tensors]

    def from_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._permute(tensor, (-1, 2)) for tensor in tensors]

    def _permute(self, tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
        if tensor.shape[0] % self.head_dim:
            raise ValueError(
                f"The number of rows must be a multiple of NeighborPairs.head_dim ({self.head_dim}), got "
                f"{tensor.shape[0]}."
            )
        return tensor.unflatten(0, (-1, self.head_dim)).unflatten(1, pairs).transpose(1, 2).flatten(0, 2)


def _check_pair(tensors: list[Tensor], transform: LayoutTransform) -> list[Tensor]:
    if len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
        raise ValueError(
            f"{transform} must get two tensors of one shape, got shapes {[list(tensor.shape) for tensor in tensors]}. "
            "Correct the rule."
        )
    return tensors


def _check_even(tensors: list[Tensor], transform: LayoutTransform, dim: int) -> Tensor:
    if len(tensors) != 1 or tensors[0].shape[dim] % 2:
        raise ValueError(
            f"{transform} must split one tensor of even size in dim {dim}, got shapes "
            f"{[list(tensor.shape) for tensor in tensors]}. Correct the rule."
        )
    return tensors[0]
