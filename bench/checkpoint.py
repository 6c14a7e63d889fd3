"""Time that a checkpoint adds to a run, asynchronous compared to synchronous.

The added time is that of a save and the steps after it, minus the time of as many steps without a save. The three are
interleaved in one process, with the state of recipes/llama3_debug.py.
"""

from __future__ import annotations

import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sizes import sized
from titan_ckpt import Checkpointer

RECIPE = Path(__file__).parent.parent / "recipes" / "llama3_debug.py"
ROUNDS, STEPS_AFTER_SAVE = sized((40, 4), (1, 1))


def build_trainer(dump_folder: str) -> Any:
    """Build the recipe's trainer with short steps, so that the time of a save exceeds their noise."""
    config = runpy.run_path(str(RECIPE))["llama3_debug"]()
    config.training.seq_len, config.training.local_batch_size, config.training.global_batch_size = 64, 2, 2
    config.activation_checkpoint = config.compile = config.validator = config.checkpoint = None
    config.dump_folder = Path(dump_folder)
    return config.build()


def seconds_of_block(trainer: Any, checkpointer: Checkpointer | None) -> float:
    """Return the seconds of a save, the steps after it, and the wait for the rest of the save."""
    start = time.perf_counter()
    if checkpointer is not None:
        checkpointer.save(trainer.step, trainer.parts)
    for _ in range(STEPS_AFTER_SAVE):
        trainer.train_step()
    if checkpointer is not None:
        checkpointer.wait()
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder)
        kinds: dict[str, Checkpointer | None] = {"none": None}
        for mode in ("disabled", "async"):
            config = Checkpointer.Config(folder=mode, async_mode=mode, interval=1, keep_latest_k=1)
            kinds[mode] = config.build(dump_folder=Path(folder))
        rounds = []
        for _ in range(ROUNDS + 2):
            rounds.append({kind: seconds_of_block(trainer, checkpointer) for kind, checkpointer in kinds.items()})
        for checkpointer in kinds.values():
            if checkpointer is not None:
                checkpointer.close()
    rounds = rounds[2:]  # the first two are warm-up
    synchronous, asynchronous = (
        statistics.median(block[mode] - block["none"] for block in rounds) for mode in ("disabled", "async")
    )
    steps = statistics.median(block["none"] for block in rounds)
    print(f"{STEPS_AFTER_SAVE} steps take {steps:.3f} s; a synchronous save adds {synchronous:.3f} s,")
    print(f"  an asynchronous save {asynchronous:.3f} s: ratio {asynchronous / synchronous:.2f} (limit 0.33)")


if __name__ == "__main__":
    main()
