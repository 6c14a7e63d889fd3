"""Inputs and targets for multi-token prediction (MTP) of one additional token."""

from __future__ import annotations

import dataclasses

from titan_data.batch import IGNORED_LABEL, Batch


def with_mtp_targets(batch: Batch) -> Batch:
    """Return the batch with `next_tokens` added to its inputs and `next_labels` to its targets, each int64 [B, T].

    `next_tokens` equals `labels`, with 0 for a missing label. `next_labels` are the labels of these tokens: the second
    next token of the same document, -100 if it is not in the sequence. Both are computed from whole sequences, before
    context parallelism splits them over ranks.
    """
    labels = batch.targets["labels"]
    followed = labels != IGNORED_LABEL
    next_labels = labels.roll(-1, 1).where(followed, IGNORED_LABEL)
    next_labels[:, -1] = IGNORED_LABEL
    return dataclasses.replace(
        batch,
        inputs=batch.inputs | {"next_tokens": labels.where(followed, 0)},
        targets=batch.targets | {"next_labels": next_labels},
        sequence_dims=batch.sequence_dims | {"next_tokens": 1, "next_labels": 1},
    )
