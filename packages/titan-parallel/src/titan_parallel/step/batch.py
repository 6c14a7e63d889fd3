"""What a parallel model is given: batches and a loss, as structural types that any package's own classes satisfy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_parallel._torch.distributed import has_no_memory

Head = Callable[[Tensor], Tensor]
"""Hidden states to logits. With loss parallel the logits are a `DTensor` sharded over the vocabulary."""


class Batch(Protocol):
    """One micro-batch of one data rank; dim 0 of every tensor is the row."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What the model is called with: `model(**inputs)`."""

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """What the loss reads."""

    @property
    def sequence_dims(self) -> Mapping[str, int]:
        """Which dim is the sequence, for those inputs and targets that have one."""


class Loss(Protocol):
    """Turns hidden states into a sum over valid targets and their count; calls `head` as often as it likes.

    Under context parallel it states what it is a sum of: `per_token` or `per_sequence`.
    """

    def __call__(self, head: Head, hidden: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return `(sum, count)`, both scalars."""


class BatchCheck(Protocol):
    """A check that needs a real batch, made before the first step."""

    def check_batch(self, batch: Batch) -> None:
        """Raise ConfigError for a model that cannot run on the mesh."""


def described(batch: Batch) -> str:
    """Names, shapes and dtypes in words, and of the contents a hash: the same for the same batch."""
    tensors = [*batch.inputs.items(), *batch.targets.items()]
    shapes = (f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors)
    hashes = sum(index * _hash(tensor) for index, (_, tensor) in enumerate(tensors, start=1))
    return f"{', '.join(shapes)}, contents {hashes % 2**64:016x}"


def _hash(tensor: Tensor) -> int:
    if tensor.numel() == 0 or has_no_memory(tensor):
        return 0
    return int(torch.hash_tensor(tensor).view(torch.int64))
