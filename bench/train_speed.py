"""Tokens a second of recipes/llama3_debug.py beside bare.py.

Everything the trainer does in a step is counted: drawing the data, metrics, the checks.
"""

from __future__ import annotations

import bare
import torch
import turns
from sizes import sized

BLOCKS, STEPS_A_BLOCK = sized((12, 5), (2, 1))


def compare(dtype: str) -> None:
    config = turns.config_of("llama3_debug", dtype)
    turns.measure(dtype, config, bare.llama_run(getattr(torch, dtype)), BLOCKS, STEPS_A_BLOCK, limit=0.97)


if __name__ == "__main__":
    turns.in_processes_of_their_own(compare)
