"""Validation of a saved loader state before it is used: its file may have been edited or copied incompletely."""

from __future__ import annotations

from typing import Any

from titan_data.packing import ENDED, Cursor

KEYS = ("documents", "tokens", "identity")
MAX_DOCUMENTS = 1 << 62
"""Maximum over all streams together: positions in the order are 64-bit integers."""


def cursors_in(state: Any) -> list[Cursor]:
    """Return the cursor of each stream in a saved state. Raises ValueError naming the first invalid entry."""
    if not isinstance(state, dict) or set(state) != set(KEYS):
        got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise _bad(f"it must have the keys {', '.join(KEYS)}", got)
    identity = state["identity"]
    if not isinstance(identity, dict):
        raise _bad("identity must be a dictionary", type(identity).__name__)
    num_streams, infinite = identity.get("num_streams"), identity.get("infinite")
    if type(num_streams) is not int or num_streams < 1:
        raise _bad("identity.num_streams must be an integer of at least 1", num_streams)
    if not isinstance(infinite, bool):
        raise _bad("identity.infinite must be true or false", infinite)
    documents = _integers(state["documents"], "documents", num_streams, least=0)
    tokens = _integers(state["tokens"], "tokens", num_streams, least=0 if infinite else ENDED)
    return [Cursor(*pair) for pair in zip(documents, tokens, strict=True)]


def check_range(cursors: list[Cursor], num_documents: int | None) -> None:
    """Raise ValueError for a cursor beyond the end of the data.

    num_documents: the documents of the source if the order is finite; None for an infinite order.
    """
    num_streams = len(cursors)
    for index, cursor in enumerate(cursors):
        most = MAX_DOCUMENTS // num_streams if num_documents is None else -(-(num_documents - index) // num_streams)
        if cursor.documents > max(0, most):
            raise _bad(f"documents[{index}] must be at most {max(0, most):,}", cursor.documents)


def _integers(values: Any, name: str, count: int, least: int) -> list[int]:
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise _bad(f"{name} must be a list of {count} integers, one per stream", got)
    for index, value in enumerate(values):
        if type(value) is not int or not least <= value < MAX_DOCUMENTS:
            raise _bad(f"{name}[{index}] must be an integer of at least {least} and below 2^62", value)
    return values


def _bad(rule: str, got: Any) -> ValueError:
    huge = isinstance(got, int) and abs(got) >= 1 << 64  # str() fails for integers of more than 4,300 digits
    shown = "an integer beyond 64 bits" if huge else str(got)
    shown = shown if len(shown) <= 100 else shown[:100] + "..."
    return ValueError(
        f"The saved state of the data loader cannot be resumed: {rule}, got {shown}. Load an undamaged checkpoint."
    )
