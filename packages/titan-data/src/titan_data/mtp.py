"""Batches for models that predict the token after next, too."""

from __future__ import annotations

import dataclasses

from titan_data.batch import IGNORED_LABEL, Batch


def with_mtp_targets(batch: Batch) -> Batch:
    """The batch with `next_tokens` among its inputs, and `next_labels` among its targets: each int64 [B, T].

    `next_tokens` are the tokens that labels are, and 0 where there is none; `next_labels` the labels of these tokens:
    the second token that follows in the same document, -100 where the row does not hold it. They are made of whole
    rows, so that whoever splits a sequence over ranks splits them with it.
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
