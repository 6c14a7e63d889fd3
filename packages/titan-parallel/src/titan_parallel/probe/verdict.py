"""The result of a probe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The result of a probe.

    `proved`: True where the split run gives the output of the whole, False where it does not, None where the probe
    could not tell. `reason` says why it is not True.
    """

    proved: bool | None
    reason: str = ""


def one_line(error: Exception) -> str:
    """Return type and message of an error of third-party code: the first line, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
