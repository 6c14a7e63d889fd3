"""The micro-batch of a training step."""

from __future__ import annotations

import dataclasses

from torch import Tensor

IGNORED_LABEL = -100
"""The label of tokens without one: the last token of a document, and padding (`ignore_index` of torch)."""

PADDING_ID = -1
"""The document id of padding: in the last sequences of a finite loader, and on ranks with fewer sequences."""


@dataclasses.dataclass
class Batch:
    """A micro-batch of B sequences of T tokens; dim 0 of every tensor is the batch dim.

    inputs: `tokens`, `positions` (from 0 at the first token of each document in the sequence) and `document_ids` (the
    position of the document in the global order, unique across epochs), each int64 [B, T].
    targets: `labels`, int64 [B, T]: the next token of the same document, -100 if there is none.
    sequence_dims: tensor name -> its sequence dim.
    sample_ids: for each sequence, the ids of its documents in order.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_dims: dict[str, int]
    sample_ids: list[list[int]]
