"""Formats in which a checkpoint stores a weight."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

from torch import Tensor

from titan_models.hugging_face.weight_mapping import WeightMapping


class TensorFormat(abc.ABC):
    """The storage format of a weight: one tensor, or quantized numbers with scales."""

    @abc.abstractmethod
    def shape(self, *tensors: Tensor) -> tuple[int, ...]:
        """Return the shape of the weight. Raises ValueError for tensors that do not match each other."""

    @abc.abstractmethod
    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        """Return `mapping` with the tensors `names` in this format; several mappings if it can be read in parts."""


@dataclass(frozen=True)
class Plain(TensorFormat):
    """An unquantized tensor."""

    def shape(self, *tensors: Tensor) -> tuple[int, ...]:
        (tensor,) = tensors
        return tuple(tensor.shape)

    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        return [replace(mapping, hf_names=names)]
