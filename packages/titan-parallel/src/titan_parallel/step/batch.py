"""Protocols of batches and losses; classes of any package satisfy them without inheritance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_parallel._torch.distributed import has_no_memory

Head = Callable[[Tensor], Tensor]
"""A call from hidden states to logits. With loss parallel the logits are a `DTensor` sharded over the vocabulary."""


class Batch(Protocol):
    """One micro-batch of one data rank; dim 0 of every tensor is the sample."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Keyword arguments of the model: `model(**inputs)`."""

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Tensors that the loss reads."""

    @property
    def sequence_dims(self) -> Mapping[str, int]:
        """The sequence dim of each input and target that has one, by name."""


class Loss(Protocol):
    """A loss: from hidden states to a sum over valid targets and their count. It may call `head` any number of times.

    Under context parallel it must declare its unit with `per_token` or `per_sequence`.
    """

    def __call__(self, head: Head, hidden: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return `(sum, count)`, both scalars."""


class BatchCheck(Protocol):
    """A check that needs a real batch and runs before the first step."""

    def check_batch(self, batch: Batch) -> None:
        """Raise ConfigError for a model that cannot run on the mesh."""


def described(batch: Batch) -> str:
    """Return names, shapes and dtypes of the tensors of `batch` as text, with a deterministic hash of the contents."""
    tensors = [*batch.inputs.items(), *batch.targets.items()]
    shapes = (f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors)
    hashes = sum(index * _hash(tensor) for index, (_, tensor) in enumerate(tensors, start=1))
    return f"{', '.join(shapes)}, contents {hashes % 2**64:016x}"


def _hash(tensor: Tensor) -> int:
    if tensor.numel() == 0 or has_no_memory(tensor):
        return 0
    return int(torch.hash_tensor(tensor).view(torch.int64))
