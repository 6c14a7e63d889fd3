"""How the numbers of a weight are held in a checkpoint."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

from torch import Tensor

from titan_models.hugging_face.weight_mapping import WeightMapping


class TensorFormat(abc.ABC):
    """One tensor, or quantized numbers and their factors."""

    @abc.abstractmethod
    def shape(self, *parts: Tensor) -> tuple[int, ...]:
        """The shape of the numbers. Raises ValueError for parts that do not fit together."""

    @abc.abstractmethod
    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        """A mapping whose one tensor is held in this form under `names`; several where it can be read in parts."""


@dataclass(frozen=True)
class Plain(TensorFormat):
    """A tensor as it is."""

    def shape(self, *parts: Tensor) -> tuple[int, ...]:
        (tensor,) = parts
        return tuple(tensor.shape)

    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        return [replace(mapping, hf_names=names)]
