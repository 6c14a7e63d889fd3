"""The global batch of a check: the caller's, or a synthetic one for a model that takes token ids.

B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel._transformers import is_transformers_model
from titan_parallel.probe.model_inputs import DOCUMENTS, TOKENS, named_inputs, vocabulary
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.step.batch import Batch


@dataclass(frozen=True)
class CheckBatch:
    """A `Batch` of plain dictionaries, which can be cut along the batch dim."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_dims: dict[str, int]

    @classmethod
    def of(cls, batch: Batch) -> CheckBatch:
        """Return a copy of a `Batch`, which shares its tensors."""
        return cls(dict(batch.inputs), dict(batch.targets), dict(batch.sequence_dims))

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(next(iter(self.inputs.values())))

    def select(self, start: int, stop: int) -> CheckBatch:
        """Return the sequences from `start` to `stop`."""
        inputs, targets = ({n: t[start:stop] for n, t in part.items()} for part in (self.inputs, self.targets))
        return CheckBatch(inputs, targets, self.sequence_dims)

    def rolled(self, count: int) -> CheckBatch:
        """Return the batch with its first `count` sequences moved to the end, which changes the order of sums."""
        inputs, targets = ({n: t.roll(-count, 0) for n, t in part.items()} for part in (self.inputs, self.targets))
        return CheckBatch(inputs, targets, self.sequence_dims)

    def to(self, dtype: torch.dtype) -> CheckBatch:
        """Return the batch with its floating-point tensors in `dtype`."""
        inputs, targets = (
            {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in part.items()}
            for part in (self.inputs, self.targets)
        )
        return CheckBatch(inputs, targets, self.sequence_dims)


def synthetic_batch(model: nn.Module, roles: Roles, batch_size: int, length: int, seed: int) -> CheckBatch:
    """Return random token ids in documents of different lengths, with a different number of labels in each sequence.

    A model that takes document ids gets three documents in each sequence, with positions that restart. So does a model
    of transformers that takes positions, which it uses to separate documents. Other models get one document. Raises
    ConfigError for a model whose forward requires other inputs.
    """
    names = _inputs_of(model)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(_vocabulary(model, roles), (batch_size, length), generator=generator)
    documents_BT, positions_BT = torch.zeros_like(tokens_BT), torch.arange(length).repeat(batch_size, 1)
    labels_BT = tokens_BT.roll(-1, 1)
    labels_BT[:, -1] = -100
    for index in range(batch_size):
        labels_BT[index, length - 1 - index % (length // 2) :] = -100
        if names.keys() & set(DOCUMENTS) or is_transformers_model(model):
            for start in (length // 4 + index % 3, length // 2 + 1 + index % 2):
                documents_BT[index, start:] += 1
                positions_BT[index, start:] = torch.arange(length - start)
                labels_BT[index, start - 1] = -100
    kinds = {"tokens": tokens_BT, "positions": positions_BT, "documents": documents_BT + batch_size}
    inputs = {name: kinds[kind] for name, kind in names.items()}
    return CheckBatch(inputs, {"labels": labels_BT}, dict.fromkeys([*inputs, "labels"], 1))


def _inputs_of(model: nn.Module) -> dict[str, str]:
    """Return {parameter of the forward: "tokens", "positions" or "documents"}."""
    found, needed = named_inputs(model)
    if "tokens" not in found.values() or not found.keys() >= set(needed):
        raise ConfigError(
            f"For a synthetic batch the forward of a model must take only token ids ({', '.join(TOKENS)}), positions "
            f"and document ids, got {type(model).__name__}, which takes {', '.join(needed) or 'nothing by name'}. Pass "
            "batch."
        )
    return found


def _vocabulary(model: nn.Module, roles: Roles) -> int:
    """Return the vocabulary size of the model."""
    size = vocabulary(model, roles)
    if size is None:
        raise ConfigError(
            "batch must be given for a model whose vocabulary size is unknown, got roles of "
            f"{type(model).__name__} without an embedding or head that has a weight. Pass batch, or add the role "
            "embedding or head."
        )
    return size


def batch_size_of(batch: Batch) -> int:
    """Return the size of dim 0 of a batch. Raises ConfigError if its tensors have different ones."""
    tensors: Mapping[str, Tensor] = {**batch.inputs, **batch.targets}
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise ConfigError(
            "All tensors of a batch must have the same size in dim 0 (the batch dim), got "
            f"{', '.join(f'{size} for {name}' for name, size in sizes.items())}."
        )
    return next(iter(sizes.values()))
