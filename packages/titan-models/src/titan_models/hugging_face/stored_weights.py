"""The weights stored in a checkpoint, plain or quantized."""

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
    """A weight of a checkpoint: the names of its tensors, their format, and the shape of the weight."""

    names: tuple[str, ...]
    tensor_format: TensorFormat
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """True if the weight is stored as one tensor, not as quantized numbers with scales."""
        return len(self.names) == 1

    def find(self, mapping: WeightMapping) -> list[WeightMapping]:
        """Return the mapping adapted to the tensors of the checkpoint, as one or several mappings."""
        return self.tensor_format.find(mapping, self.names, self.shape)


def stored_weights_in(
    known: Mapping[str, str], stored: Mapping[str, Tensor], fp8: Fp8Blocks
) -> dict[str, StoredWeight]:
    """Return the weights of a checkpoint by name; `known` maps names to the names in the checkpoint.

    Raises ValueError for scales whose shape does not match the blocks, and for weights stored twice.
    """
    stored_weights = {}
    used: set[str] = set()
    for name, tensors, tensor_format in _quantized(known, fp8):
        hf_names = tuple(known[tensor] for tensor in tensors)
        shape = tensor_format.shape(*(stored[hf_name] for hf_name in hf_names))
        stored_weights[name] = StoredWeight(hf_names, tensor_format, shape)
        used.update(tensors)
    for name in known:
        if name in used:
            continue
        if name in stored_weights:
            raise ValueError(
                f"A checkpoint must store each weight once, got {name} both quantized and not. Download it again."
            )
        stored_weights[name] = StoredWeight((known[name],), Plain(), tuple(stored[known[name]].shape))
    return stored_weights


def _quantized(known: Mapping[str, str], fp8: Fp8Blocks) -> Iterator[tuple[str, tuple[str, str], TensorFormat]]:
    """Yield the name of each quantized weight, the names of its tensors, and its format."""
    for name in known:
        stem = name.removesuffix("_blocks")
        if f"{name}_scale_inv" in known:
            yield name, (name, f"{name}_scale_inv"), fp8
        elif stem != name and f"{stem}_scales" in known:
            yield stem, (name, f"{stem}_scales"), Mxfp4()
