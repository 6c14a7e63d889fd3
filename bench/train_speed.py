"""Tokens a second of recipes/llama3_debug.py beside bare.py: blocks of steps take turns in one process.

Everything the trainer does in a step is counted: drawing the data, metrics, the checks.
"""

from __future__ import annotations

import multiprocessing
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bare
import torch

RECIPE = Path(__file__).parent.parent / "recipes" / "llama3_debug.py"
BLOCKS, STEPS_A_BLOCK, WARMUP_STEPS = 12, 5, 3


def config_of(dtype: str, dump_folder: str) -> Any:
    """The recipe with what the bare loop has: the same shapes, nothing but training."""
    config = runpy.run_path(str(RECIPE))["llama3_debug"]()
    config.training.seq_len, config.training.local_batch_size, config.training.global_batch_size = (
        bare.T,
        bare.B,
        bare.B,
    )
    config.training.mixed_precision_param = dtype
    config.training.steps = WARMUP_STEPS + BLOCKS * STEPS_A_BLOCK
    config.activation_checkpoint = config.compile = config.validator = config.checkpoint = None
    config.dump_folder = Path(dump_folder)
    return config


def compare(dtype: str) -> None:
    """Train with the trainer, and after each block of its steps as many of the bare loop's."""
    bare_run = bare.BareRun(getattr(torch, dtype))
    bare_run.step()
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = config_of(dtype, folder).build()
        after_step, started = trainer.after_step, time.perf_counter()

        def after_step_and_bare_block(result: Any) -> None:
            nonlocal started
            after_step(result)
            if trainer.step > WARMUP_STEPS and (trainer.step - WARMUP_STEPS) % STEPS_A_BLOCK == 0:
                middle = time.perf_counter()
                for _ in range(STEPS_A_BLOCK):
                    bare_run.step()
                ours.append(middle - started)
                theirs.append(time.perf_counter() - middle)
            if trainer.step >= WARMUP_STEPS and (trainer.step - WARMUP_STEPS) % STEPS_A_BLOCK == 0:
                started = time.perf_counter()

        trainer.after_step = after_step_and_bare_block
        trainer.train()
    report(dtype, ours, theirs)


def report(dtype: str, ours: list[float], theirs: list[float]) -> None:
    tokens = STEPS_A_BLOCK * bare.B * bare.T
    ratios = sorted(their_seconds / our_seconds for our_seconds, their_seconds in zip(ours, theirs, strict=True))
    speeds = [tokens / statistics.median(seconds) for seconds in (ours, theirs)]
    print(f"{dtype}: titan {speeds[0]:.0f} tokens/s, bare loop {speeds[1]:.0f}", end=", ")
    print(
        f"ratio {statistics.median(ratios):.3f} (limit 0.97; {len(ratios)} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    for dtype in ("float32", "bfloat16"):
        process = multiprocessing.get_context("spawn").Process(target=compare, args=(dtype,))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"The comparison in {dtype} ended with code {process.exitcode}.")
