"""The mapping between weights of a model and tensors of a Hugging Face checkpoint, convertible by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from titan_models.hugging_face.layout_transforms import LayoutTransform

Slot = tuple[str, int | None]
"""The name of a weight of the model, with the index of one matrix if the weight is a stack of matrices."""


@dataclass(frozen=True)
class WeightMapping:
    """Weights of the model (`own`) and the tensors of a Hugging Face checkpoint (`hf_names`) with the same values.

    There is one such tensor, unless `decode` combines several: quantized numbers and their scales. A mapping without
    `own` checks or ignores tensors that the model does not need. A mapping without `hf_names` gives the initial value
    of state that is not exported.
    """

    own: tuple[Slot, ...]
    hf_names: tuple[str, ...]
    transforms: tuple[LayoutTransform, ...] = ()
    decode: Callable[..., Tensor] | None = None
    keeps_dtype: bool = False
    """True if the dtype is kept when weights are exported in another dtype, as for buffers."""

    @property
    def hf_name(self) -> str:
        """The first Hugging Face name, which is the only one of an exported mapping."""
        return self.hf_names[0]

    @property
    def is_quantized(self) -> bool:
        """True if the values are computed in fp32, and may be rounded to the dtype of the model."""
        return self.decode is not None

    def to_hf(self, own: Sequence[Tensor]) -> Tensor:
        """Return the Hugging Face tensor for tensors of the model: the same object if there are no transforms."""
        tensors = list(own)
        for transform in self.transforms:
            tensors = transform.to_hf(tensors)
        if len(tensors) != 1:
            raise ValueError(
                f"The transforms of a rule must give one tensor, got {len(tensors)} for {self.hf_name} from "
                f"{', '.join(name for name, _ in self.own)}. Add a transform that joins them, such as Halves."
            )
        return tensors[0]

    def from_hf(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the model for Hugging Face tensors: the same object if there are no transforms."""
        tensors = list(stored) if self.decode is None else [self.decode(*stored)]
        for transform in reversed(self.transforms):
            tensors = transform.from_hf(tensors)
        return tensors if self.own else []
