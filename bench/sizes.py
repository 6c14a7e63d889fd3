"""The flag `--toy` of the benchmarks: toy sizes, to test that a script runs in seconds; its numbers mean nothing."""

from __future__ import annotations

import sys
from typing import TypeVar

T = TypeVar("T")
TOY = "--toy" in sys.argv


def sized(full: T, toy: T) -> T:
    """Return `full`, the size to measure, or `toy` with the flag `--toy`."""
    return toy if TOY else full
