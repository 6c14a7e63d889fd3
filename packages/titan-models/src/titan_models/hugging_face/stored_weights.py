"""What the tensors of a checkpoint are once they are not quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from titan_models.hugging_face.fp8 import Fp8Blocks
from titan_models.hugging_face.mxfp4 import Mxfp4
from titan_models.hugging_face.tensor_formats import Plain, TensorFormat
from titan_models.hugging_face.weight_mapping import WeightMapping


@dataclass(frozen=True)
class StoredWeight:
    """The tensors of a checkpoint that are one weight, and how."""

    names: tuple[str, ...]
    form: TensorFormat
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is one tensor, not quantized numbers and their factors."""
        return len(self.names) == 1

    def find(self, mapping: WeightMapping) -> list[WeightMapping]:
        """A mapping as it is in the checkpoint, as one or several."""
        return self.form.find(mapping, self.names, self.shape)


def stored_weights_in(
    known: Mapping[str, str], stored: Mapping[str, Tensor], fp8: Fp8Blocks
) -> dict[str, StoredWeight]:
    """The weights in a checkpoint; `known` maps their names to those that they have there.

    Raises ValueError for factors whose shape is not that of the numbers' blocks.
    """
    stored_weights = {}
    taken: set[str] = set()
    for name, parts, form in _quantized(known, fp8):
        there = tuple(known[part] for part in parts)
        stored_weights[name] = StoredWeight(there, form, form.shape(*(stored[part] for part in there)))
        taken.update(parts)
    for name in known:
        if name in taken:
            continue
        if name in stored_weights:
            raise ValueError(
                f"Got a checkpoint that holds {name} twice, quantized and not. A weight has one place. Download it "
                "again."
            )
        stored_weights[name] = StoredWeight((known[name],), Plain(), tuple(stored[known[name]].shape))
    return stored_weights


def _quantized(known: Mapping[str, str], fp8: Fp8Blocks) -> Iterator[tuple[str, tuple[str, str], TensorFormat]]:
    """The name of each quantized weight, those of its parts, and its form."""
    for name in known:
        stem = name.removesuffix("_blocks")
        if f"{name}_scale_inv" in known:
            yield name, (name, f"{name}_scale_inv"), fp8
        elif stem != name and f"{stem}_scales" in known:
            yield stem, (name, f"{stem}_scales"), Mxfp4()
