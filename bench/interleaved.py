"""Interleaved timing: blocks of steps of the trainer and of the baseline alternate in one process.

Other load on the machine then slows both of them.
"""

from __future__ import annotations

import multiprocessing
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bare
from sizes import TOY, sized

RECIPES = Path(__file__).parent.parent / "recipes"
WARMUP_STEPS = 3
Seconds = tuple[float, float]
"""Wall-clock time, and CPU time of all threads."""


def config_of(recipe: str, dtype: str) -> Any:
    """Return the config of a recipe with the shapes and the features of the baseline: training only."""
    sys.path.append(str(RECIPES))  # where Python looks when a recipe is run as a script
    config = runpy.run_path(str(RECIPES / f"{recipe}.py"))[recipe]()
    training = config.training
    training.seq_len, training.local_batch_size, training.global_batch_size = bare.T, bare.B, bare.B
    training.mixed_precision_param = dtype
    config.model.num_layers = sized(config.model.num_layers, 2)
    config.activation_checkpoint = config.compile = config.validator = config.checkpoint = None
    return config


def train_interleaved(config: Any, bare_run: bare.BareRun, steps_per_block: int) -> list[tuple[Seconds, Seconds]]:
    """Train with the trainer, and run as many baseline steps after each block; return the seconds of both per block."""
    bare_run.step()
    timings: list[tuple[Seconds, Seconds]] = []
    with tempfile.TemporaryDirectory() as folder:
        config.dump_folder = Path(folder)
        trainer = config.build()
        after_step, started = trainer.after_step, _now()

        def after_step_and_bare_block(result: Any) -> None:
            nonlocal started
            after_step(result)
            done = trainer.step - WARMUP_STEPS
            if done > 0 and done % steps_per_block == 0:
                middle = _now()
                for _ in range(steps_per_block):
                    bare_run.step()
                timings.append((_between(started, middle), _between(middle, _now())))
            if done >= 0 and done % steps_per_block == 0:
                started = _now()

        trainer.after_step = after_step_and_bare_block
        trainer.train()
    return timings


def measure(name: str, config: Any, bare_run: bare.BareRun, blocks: int, steps_per_block: int, limit: float) -> None:
    """Time `blocks` interleaved blocks of steps of the trainer and of the baseline, and print a report."""
    config.training.steps = WARMUP_STEPS + blocks * steps_per_block
    timings = train_interleaved(config, bare_run, steps_per_block)
    report(name, timings, tokens=steps_per_block * bare.B * bare.T, limit=limit)


def report(name: str, timings: list[tuple[Seconds, Seconds]], tokens: int, limit: float) -> None:
    """Print the tokens per second of both and their ratio, by wall-clock time and by CPU time."""
    for kind, title in enumerate((name, f"{name}, CPU time")):
        ours, baseline = ([seconds[kind] for seconds in side] for side in zip(*timings, strict=True))
        ratios = sorted(slower / faster for faster, slower in zip(ours, baseline, strict=True))
        titan, bare_loop = (tokens / statistics.median(side) for side in (ours, baseline))
        spread = f"{len(ratios)} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(
            f"{title}: titan {titan:.0f} tokens/s, bare loop {bare_loop:.0f},\n"
            f"  ratio {statistics.median(ratios):.3f} (limit {limit}; {spread})"
        )


def in_subprocesses(compare: Callable[[str], None]) -> None:
    """Call `compare(dtype)` for fp32 and bf16, each in a new process; with `--toy` for fp32, in this one."""
    if TOY:
        return compare("float32")
    for dtype in ("float32", "bfloat16"):
        process = multiprocessing.get_context("spawn").Process(target=compare, args=(dtype,))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"The {dtype} benchmark failed with exit code {process.exitcode}.")


def _now() -> Seconds:
    return time.perf_counter(), time.process_time()


def _between(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]
