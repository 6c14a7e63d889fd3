"""Tokens per second of recipes/llama3_debug.py, compared to bare.py.

The trainer's time includes all that it does in a step: loading data, metrics, checks.
"""

from __future__ import annotations

import bare
import interleaved
import torch
from sizes import sized

BLOCKS, STEPS_PER_BLOCK = sized((12, 5), (2, 1))


def compare(dtype: str) -> None:
    config = interleaved.config_of("llama3_debug", dtype)
    interleaved.measure(dtype, config, bare.llama_run(getattr(torch, dtype)), BLOCKS, STEPS_PER_BLOCK, limit=0.97)


if __name__ == "__main__":
    interleaved.in_subprocesses(compare)
