"""Exceptions raised by saves and loads."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint could not be saved or loaded. The message states the invalid value, the requirement and the fix."""


class BrokenCheckpoint(CheckpointError):
    """An invalid checkpoint: its manifest is missing or invalid, or a file does not match its record."""


class UnknownFormat(BrokenCheckpoint):
    """A checkpoint of a format that this version cannot read; it may be valid, so the run must stop."""


class SaveFailed(CheckpointError):
    """The disk failed during a save; a later save may succeed."""


def join_names(names: Sequence[str], limit: int = 4) -> str:
    """Join the first `limit` names and append the number of omitted ones.

    >>> join_names(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
