"""What makes two loaders give the same rows, and what becomes of a saved state when it is not the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titan_data.packing import Cursor

KEEPS_PLACES = ("seq_len", "global_batch_size")
"""Changes that leave a stream at the very token where it stood."""


def check_identity(saved: dict[str, Any], current: dict[str, Any], allow_changes: bool) -> None:
    """Raise ValueError naming each difference, old -> new, unless changes are allowed."""
    found = list(differences(saved, current))
    if found and not allow_changes:
        raise ValueError(
            f"A resumed run must have the data it began with, got {'; '.join(found)}. Set these back, begin in another "
            "folder, or set allow_changes of the loader (a flag: --dataloader.allow_changes) to go on with other rows."
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
    """Return where the streams begin when the identity went from `saved` to `current`.

    Another row length or global batch: at the same tokens. Another number of streams: at the first position that no old
    stream has begun, so that no text comes twice in an epoch. Anything else: at the beginning of the same documents.
    """
    if saved["num_streams"] != current["num_streams"]:
        return _redealt(cursors, current["num_streams"])
    changed = {key for key in current if saved.get(key) != current[key]}
    if changed <= set(KEEPS_PLACES):
        return cursors
    return [Cursor(cursor.documents, 0) for cursor in cursors]


def _redealt(cursors: list[Cursor], num_streams: int) -> list[Cursor]:
    begun = (cursor.documents + (cursor.tokens > 0) for cursor in cursors)
    first = max(index + (count - 1) * len(cursors) + 1 if count else 0 for index, count in enumerate(begun))
    return [Cursor(max(0, -(-(first - index) // num_streams)), 0) for index in range(num_streams)]
