"""One step of one rank: which rows of the global batch are its own, and how they are made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from titan_data.batch import IGNORED_LABEL, PADDING_ID, Batch
from titan_data.packing import COLUMNS, ENDED, Cursor, Row, RowStream


class Share(NamedTuple):
    """The rows `begin` to `end` of a global batch, one rank's, in `num_micro` micro-batches; what lacks is padding."""

    begin: int
    end: int
    num_rows: int
    num_streams: int
    micro_rows: int
    num_micro: int
    seq_len: int

    @property
    def read(self) -> list[int]:
        """The streams these rows are from."""
        return sorted({row % self.num_streams for row in range(self.begin, self.end)})

    @property
    def owned(self) -> list[int]:
        """The streams this rank answers for: those whose first row of the step is here."""
        return list(range(self.begin, min(self.end, self.num_streams)))


class Step(NamedTuple):
    """A step made ready: its micro-batches, and all rows read for it, by stream."""

    share: Share
    batches: list[Batch]
    rows: dict[int, list[Row]]


def make_step(streams: dict[int, RowStream], share: Share) -> Step:
    """Read the step's rows of each stream, also those another rank keeps: a stream has one order."""
    num_rows = share.num_rows // share.num_streams
    rows = {index: [stream.next_row() for _ in range(num_rows)] for index, stream in streams.items()}
    mine = [rows[row % share.num_streams][row // share.num_streams] for row in range(share.begin, share.end)]
    size = share.micro_rows
    mine += [_padding(share.seq_len)] * (share.num_micro * size - len(mine))
    return Step(share, [_batch(mine[first : first + size]) for first in range(0, len(mine), size)], rows)


def _padding(seq_len: int) -> Row:
    columns = np.zeros((len(COLUMNS), seq_len), np.int64)
    columns[COLUMNS.index("document_ids")] = PADDING_ID
    columns[COLUMNS.index("labels")] = IGNORED_LABEL
    return Row(columns, [], Cursor(0, ENDED))


def _batch(rows: list[Row]) -> Batch:
    tensors = dict(zip(COLUMNS, torch.from_numpy(np.stack([row.columns for row in rows], axis=1)), strict=True))
    targets = {"labels": tensors.pop("labels")}
    return Batch(tensors, targets, dict.fromkeys(COLUMNS, 1), [row.sample_ids for row in rows])
