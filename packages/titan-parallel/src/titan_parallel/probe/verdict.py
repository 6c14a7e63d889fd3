"""What a probe found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`proved` says whether parts give what the whole gives; None where it could not be found out. `why` if not."""

    proved: bool | None
    why: str = ""


def one_line(error: Exception) -> str:
    """Return the error of third-party code in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
