"""One training step of one data rank: its slice of the global batch, and the assembly of its micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from titan_data.batch import IGNORED_LABEL, PADDING_ID, Batch
from titan_data.packing import COLUMNS, ENDED, Cursor, PackedSequence, SequenceStream


class Share(NamedTuple):
    """One rank's slice of the global batch: sequences `begin` to `end` (exclusive), in `num_micro` micro-batches.

    Micro-batches hold `micro_batch_size` sequences; those that the slice does not fill are padded.
    """

    begin: int
    end: int
    global_batch_size: int
    num_streams: int
    micro_batch_size: int
    num_micro: int
    seq_len: int

    @property
    def read(self) -> list[int]:
        """The streams of the sequences in the slice."""
        return sorted({index % self.num_streams for index in range(self.begin, self.end)})

    @property
    def owned(self) -> list[int]:
        """The streams whose first sequence of the step is in the slice; this rank reports their cursor delta."""
        return list(range(self.begin, min(self.end, self.num_streams)))


class Step(NamedTuple):
    """A prepared step: the micro-batches of one rank, and all sequences read for them, by stream."""

    share: Share
    batches: list[Batch]
    sequences: dict[int, list[PackedSequence]]


def make_step(streams: dict[int, SequenceStream], share: Share) -> Step:
    """Read the sequences of the step from each stream and return the micro-batches of `share`.

    Sequences of these streams that belong to other ranks are read too, because a stream can only be read in order.
    """
    per_stream = share.global_batch_size // share.num_streams
    sequences = {index: [stream.next_sequence() for _ in range(per_stream)] for index, stream in streams.items()}
    local = [sequences[i % share.num_streams][i // share.num_streams] for i in range(share.begin, share.end)]
    size = share.micro_batch_size
    local += [_padding(share.seq_len)] * (share.num_micro * size - len(local))
    return Step(share, [_batch(local[first : first + size]) for first in range(0, len(local), size)], sequences)


def _padding(seq_len: int) -> PackedSequence:
    columns = np.zeros((len(COLUMNS), seq_len), np.int64)
    columns[COLUMNS.index("document_ids")] = PADDING_ID
    columns[COLUMNS.index("labels")] = IGNORED_LABEL
    return PackedSequence(columns, [], Cursor(0, ENDED))


def _batch(sequences: list[PackedSequence]) -> Batch:
    stacked = torch.from_numpy(np.stack([sequence.columns for sequence in sequences], axis=1))
    tensors = dict(zip(COLUMNS, stacked, strict=True))
    targets = {"labels": tensors.pop("labels")}
    return Batch(tensors, targets, dict.fromkeys(COLUMNS, 1), [sequence.sample_ids for sequence in sequences])
