"""The identity of the data: compare it with that of a saved state, and adapt cursors after a permitted change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titan_data.packing import Cursor

KEEPS_PLACES = ("seq_len", "global_batch_size")
"""Settings whose change leaves every stream at the same token."""


def check_identity(saved: dict[str, Any], current: dict[str, Any], allow_changes: bool) -> None:
    """Raise ValueError listing each difference as `old -> new`, unless changes are allowed."""
    found = list(differences(saved, current))
    if found and not allow_changes:
        raise ValueError(
            f"A resumed run must have the data and settings of the saved state, got {'; '.join(found)}. Restore them, "
            "use another output folder, or set allow_changes (--dataloader.allow_changes) to continue with the change."
        )


def differences(saved: Any, current: Any, name: str = "") -> Iterator[str]:
    """Yield `name: old -> new` for each leaf that differs between two nested dictionaries."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences(saved.get(key), current.get(key), inner)
    elif saved != current:
        yield f"{name}: {saved} -> {current}"


def carried_over(cursors: list[Cursor], saved: dict[str, Any], current: dict[str, Any]) -> list[Cursor]:
    """Return the cursors with which streams continue after the identity changed from `saved` to `current`.

    If only the sequence length or the global batch size changed, streams continue at the same tokens. If the number of
    streams changed, they continue after the last document that an old stream has begun, so that no text is repeated in
    an epoch. After any other change, they continue at the beginning of the same documents.
    """
    if saved["num_streams"] != current["num_streams"]:
        return _redistributed(cursors, current["num_streams"])
    changed = {key for key in current if saved.get(key) != current[key]}
    if changed <= set(KEEPS_PLACES):
        return cursors
    return [Cursor(cursor.documents, 0) for cursor in cursors]


def _redistributed(cursors: list[Cursor], num_streams: int) -> list[Cursor]:
    begun = (cursor.documents + (cursor.tokens > 0) for cursor in cursors)
    first = max(index + (count - 1) * len(cursors) + 1 if count else 0 for index, count in enumerate(begun))
    return [Cursor(max(0, -(-(first - index) // num_streams)), 0) for index in range(num_streams)]
