"""What a training step is made of: token rows, and what travels with them."""

from __future__ import annotations

import dataclasses

from torch import Tensor

IGNORED_LABEL = -100
"""The label of a token that has none: the last of a document, and padding."""

PADDING_ID = -1
"""The document id of padding: the last rows of a finite loader, and what fills up ranks that got fewer rows."""


@dataclasses.dataclass
class Batch:
    """One micro-batch of B rows of T tokens; dim 0 of every tensor is the row.

    inputs: `tokens`, `positions` (from 0 at the first token of each document in the row) and `document_ids` (the
    document's place in the global order, never the same twice), each int64 [B, T].
    targets: `labels`, int64 [B, T]: the token that follows in the same document, -100 where there is none.
    sequence_dims: name of a tensor -> its dim that is the sequence.
    sample_ids: per row, the ids of the documents in it, in order.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_dims: dict[str, int]
    sample_ids: list[list[int]]
