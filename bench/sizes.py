"""`--toy` on the command line of a script of bench/: it runs in seconds, and measures nothing."""

from __future__ import annotations

import sys
from typing import TypeVar

T = TypeVar("T")
TOY = "--toy" in sys.argv


def sized(full: T, toy: T) -> T:
    """Return the size to measure at, or that of a toy."""
    return toy if TOY else full
