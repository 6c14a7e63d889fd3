"""The ways in which a checkpoint fails its reader."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint could not be saved or loaded; the message says what was got, what is needed and what to do."""


class BrokenCheckpoint(CheckpointError):
    """A folder that is not a whole checkpoint: the manifest is missing or invalid, or a file is not what it says."""


class UnknownFormat(BrokenCheckpoint):
    """A checkpoint of a format that this version does not read: it may be whole, so a run stops there."""


class SaveFailed(CheckpointError):
    """The disk did not take a save; the next one may succeed."""


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Join the first `limit` names and say how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
