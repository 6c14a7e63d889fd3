"""A trainer and a bare loop take turns in one process: what disturbs the machine disturbs both."""

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
"""Of the clock, and of the processor in all threads."""


def config_of(recipe: str, dtype: str) -> Any:
    """The recipe with what the bare loop has: the same shapes, nothing but training."""
    sys.path.append(str(RECIPES))  # where Python looks when a recipe is run as a script
    config = runpy.run_path(str(RECIPES / f"{recipe}.py"))[recipe]()
    training = config.training
    training.seq_len, training.local_batch_size, training.global_batch_size = bare.T, bare.B, bare.B
    training.mixed_precision_param = dtype
    config.model.num_layers = sized(config.model.num_layers, 2)
    config.activation_checkpoint = config.compile = config.validator = config.checkpoint = None
    return config


def train_in_turns(config: Any, bare_run: bare.BareRun, steps_a_block: int) -> list[tuple[Seconds, Seconds]]:
    """Train with the trainer, and after each block of its steps as many of the bare loop's; what both took."""
    bare_run.step()
    taken: list[tuple[Seconds, Seconds]] = []
    with tempfile.TemporaryDirectory() as folder:
        config.dump_folder = Path(folder)
        trainer = config.build()
        after_step, started = trainer.after_step, _now()

        def after_step_and_bare_block(result: Any) -> None:
            nonlocal started
            after_step(result)
            done = trainer.step - WARMUP_STEPS
            if done > 0 and done % steps_a_block == 0:
                middle = _now()
                for _ in range(steps_a_block):
                    bare_run.step()
                taken.append((_between(started, middle), _between(middle, _now())))
            if done >= 0 and done % steps_a_block == 0:
                started = _now()

        trainer.after_step = after_step_and_bare_block
        trainer.train()
    return taken


def measure(what: str, config: Any, bare_run: bare.BareRun, blocks: int, steps_a_block: int, limit: float) -> None:
    """Let `blocks` of steps of both take turns, and report."""
    config.training.steps = WARMUP_STEPS + blocks * steps_a_block
    taken = train_in_turns(config, bare_run, steps_a_block)
    report(what, taken, tokens=steps_a_block * bare.B * bare.T, limit=limit)


def report(what: str, taken: list[tuple[Seconds, Seconds]], tokens: int, limit: float) -> None:
    """Print tokens a second of both, and their ratio, of the clock and of the processor's time."""
    for kind, name in enumerate((what, f"{what}, of processor time")):
        ours, theirs = ([seconds[kind] for seconds in side] for side in zip(*taken, strict=True))
        ratios = sorted(slower / faster for faster, slower in zip(ours, theirs, strict=True))
        titan, bare_loop = (tokens / statistics.median(side) for side in (ours, theirs))
        spread = f"{len(ratios)} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(
            f"{name}: titan {titan:.0f} tokens/s, bare loop {bare_loop:.0f}, "
            f"ratio {statistics.median(ratios):.3f} (limit {limit}; {spread})"
        )


def in_processes_of_their_own(compare: Callable[[str], None]) -> None:
    """`compare(dtype)` for fp32 and bf16; a toy in this process."""
    if TOY:
        return compare("float32")
    for dtype in ("float32", "bfloat16"):
        process = multiprocessing.get_context("spawn").Process(target=compare, args=(dtype,))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"The comparison in {dtype} ended with code {process.exitcode}.")


def _now() -> Seconds:
    return time.perf_counter(), time.process_time()


def _between(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]
