"""Tokens a second of recipes/llama3_debug.py beside bare.py.

Everything the trainer does in a step is counted: drawing the data, metrics, the checks.
"""

from __future__ import annotations

import bare
import torch
import turns

BLOCKS, STEPS_A_BLOCK = 12, 5


def compare(dtype: str) -> None:
    config = turns.config_of("llama3_debug", dtype, steps=BLOCKS * STEPS_A_BLOCK)
    taken = turns.train_in_turns(config, bare.llama_run(getattr(torch, dtype)), STEPS_A_BLOCK)
    turns.report(dtype, taken, tokens=STEPS_A_BLOCK * bare.B * bare.T, limit=0.97)


if __name__ == "__main__":
    turns.in_processes_of_their_own(compare)
