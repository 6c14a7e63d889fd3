"""The global batch of a check: somebody's own, or one made up for a model that reads token ids.

B rows, T tokens.
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
    """A `Batch` of plain dictionaries, which can be cut into rows."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_dims: dict[str, int]

    @classmethod
    def of(cls, batch: Batch) -> CheckBatch:
        """A copy of anybody's batch."""
        return cls(dict(batch.inputs), dict(batch.targets), dict(batch.sequence_dims))

    @property
    def num_rows(self) -> int:
        """Of every tensor in it."""
        return len(next(iter(self.inputs.values())))

    def rows(self, start: int, stop: int) -> CheckBatch:
        """Some of its rows."""
        inputs, targets = ({n: t[start:stop] for n, t in part.items()} for part in (self.inputs, self.targets))
        return CheckBatch(inputs, targets, self.sequence_dims)

    def turned(self, count: int) -> CheckBatch:
        """With its first rows last: what sums over rows adds them in another order."""
        inputs, targets = ({n: t.roll(-count, 0) for n, t in part.items()} for part in (self.inputs, self.targets))
        return CheckBatch(inputs, targets, self.sequence_dims)

    def to(self, dtype: torch.dtype) -> CheckBatch:
        """With its floating-point tensors in `dtype`."""
        inputs, targets = (
            {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in part.items()}
            for part in (self.inputs, self.targets)
        )
        return CheckBatch(inputs, targets, self.sequence_dims)


def make_up_batch(model: nn.Module, roles: Roles, rows: int, length: int, seed: int) -> CheckBatch:
    """Random tokens in documents of uneven lengths, and rows with uneven numbers of labels.

    A model that takes document ids gets three documents a row, whose positions restart, and so does one of transformers
    that takes positions, by which it tells documents apart. Another one gets one document.
    Raises ConfigError where the forward of the model asks for something else.
    """
    names = _inputs_of(model)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(_vocabulary(model, roles), (rows, length), generator=generator)
    documents_BT, positions_BT = torch.zeros_like(tokens_BT), torch.arange(length).repeat(rows, 1)
    labels_BT = tokens_BT.roll(-1, 1)
    labels_BT[:, -1] = -100
    for row in range(rows):
        labels_BT[row, length - 1 - row % (length // 2) :] = -100
        if names.keys() & set(DOCUMENTS) or is_transformers_model(model):
            for start in (length // 4 + row % 3, length // 2 + 1 + row % 2):
                documents_BT[row, start:] += 1
                positions_BT[row, start:] = torch.arange(length - start)
                labels_BT[row, start - 1] = -100
    kinds = {"tokens": tokens_BT, "positions": positions_BT, "documents": documents_BT + rows}
    inputs = {name: kinds[kind] for name, kind in names.items()}
    return CheckBatch(inputs, {"labels": labels_BT}, dict.fromkeys([*inputs, "labels"], 1))


def _inputs_of(model: nn.Module) -> dict[str, str]:
    """What the forward takes: name -> tokens, positions or documents."""
    found, needed = named_inputs(model)
    if "tokens" not in found.values() or not found.keys() >= set(needed):
        raise ConfigError(
            f"Got a forward of {type(model).__name__} that takes {', '.join(needed) or 'nothing by name'}. A batch is "
            f"made up for models that take token ids ({', '.join(TOKENS)}), positions and document ids. Give batch."
        )
    return found


def _vocabulary(model: nn.Module, roles: Roles) -> int:
    """How many ids the model knows."""
    size = vocabulary(model, roles)
    if size is None:
        raise ConfigError(
            f"Got roles of {type(model).__name__} without an embedding or a head that has a weight. A batch is made up "
            "of ids below the number of its rows. Name one of them in the roles, or give batch."
        )
    return size


def count_rows(batch: Batch) -> int:
    """How many rows a batch has. Raises ConfigError where its tensors do not agree."""
    tensors: Mapping[str, Tensor] = {**batch.inputs, **batch.targets}
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        raise ConfigError(
            f"Got a batch with {', '.join(f'{count} rows of {name}' for name, count in counts.items())}. Dim 0 of each "
            "is the row. Give as many rows of each."
        )
    return next(iter(counts.values()))
