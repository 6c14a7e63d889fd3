"""The smallest parts of a model that can be brought to Hugging Face's layout, or from it, by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from titan_models.hugging_face.layout_transforms import LayoutTransform

Slot = tuple[str, int | None]
"""A weight of the model, or (with a number) one of the matrices that it is a stack of."""


@dataclass(frozen=True)
class WeightMapping:
    """Weights of the model, and the tensors of Hugging Face's that hold the same numbers.

    That is one tensor, unless `decode` makes one of several: of quantized numbers and their factors. A mapping without
    own weights is a check of tensors that the model has no use for, one without Hugging Face's a beginning: own state
    that is not exported.
    """

    own: tuple[Slot, ...]
    hf_names: tuple[str, ...]
    transforms: tuple[LayoutTransform, ...] = ()
    decode: Callable[..., Tensor] | None = None
    keeps_dtype: bool = False
    """Whether it stays in its dtype when weights are exported in another: buffers do."""

    @property
    def hf_name(self) -> str:
        """The one tensor of Hugging Face's."""
        return self.hf_names[0]

    @property
    def is_quantized(self) -> bool:
        """Whether the numbers are computed, in fp32, and so may be rounded to the model's dtype."""
        return self.decode is not None

    def to_hf(self, own: Sequence[Tensor]) -> Tensor:
        """Hugging Face's tensor, of own ones. Without transforms it is the very tensor that was given."""
        tensors = list(own)
        for step in self.transforms:
            tensors = step.to_hf(tensors)
        if len(tensors) != 1:
            raise ValueError(
                f"Got a rule by which {', '.join(name for name, _ in self.own)} are {len(tensors)} tensors after all "
                f"transforms. {self.hf_name} is one. Add a step that joins them."
            )
        return tensors[0]

    def from_hf(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        """Own tensors, of Hugging Face's. Without transforms it is the very tensor that was given."""
        tensors = list(theirs) if self.decode is None else [self.decode(*theirs)]
        for step in reversed(self.transforms):
            tensors = step.from_hf(tensors)
        return tensors if self.own else []
