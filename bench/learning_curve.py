"""Learning curves of Llama 3 "debug" and of torchtitan's, on the same rows of text, for several seeds.

`python bench/learning_curve.py PYTHON`: the interpreter of an environment with torchtitan (`nox -s learning_curve`
makes one). fp32, 8 rows of 256 tokens, one process. Prints both curves and what the seeds of each end at.
"""

from __future__ import annotations

import json
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sizes import TOY, sized

RECIPES = Path(__file__).parent.parent / "recipes"
PEER = Path(__file__).parent / "torchtitan" / "llama3.py"
SEEDS, STEPS, LAST = sized(((0, 1, 2, 3, 4), 100, 20), ((0,), 3, 2))
ROWS, TOKENS, WARMUP = 8, 256, 5
Curve = dict[str, list[float]]
"""The loss and the gradient norm of each step."""


def config_of(folder: Path) -> Any:
    config = runpy.run_path(str(RECIPES / "llama3_debug.py"))["llama3_debug"]()
    config.training.steps, config.training.seq_len = STEPS, TOKENS
    config.training.local_batch_size = config.training.global_batch_size = ROWS
    config.lr_scheduler.warmup_steps = WARMUP
    config.validator = config.checkpoint = None
    config.dump_folder = folder
    return config


def titan_curve(seed: int) -> Curve:
    """Train with the trainer; `seed` is of the initial weights, the rows are the same."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = config_of(Path(folder)).build()
        trainer.model.init_weights(seed)
        trainer.train()
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm")}


def torchtitan_curve(python: str, rows: Path, lr: float, seed: int) -> Curve:
    command = [python, str(PEER), str(rows), str(seed), str(lr), str(WARMUP)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def write_rows(file: Path) -> float:
    """Write the rows that the trainer draws, and return its learning rate."""
    config = config_of(file.parent)
    loader = config.dataloader.build(
        tokenizer=config.tokenizer.build(),
        seq_len=TOKENS,
        global_batch_size=ROWS,
        local_batch_size=ROWS,
        seed=config.debug.seed,
    )
    rows = []
    for _ in range(STEPS):
        (batch,) = loader.next_batches(0, 1)
        loader.commit(loader.cursor_delta())
        rows.append({**batch.inputs, **batch.targets})
    torch.save(rows, file)
    return config.optimizer.lr


def end_of(curve: Curve) -> float:
    return statistics.mean(curve["loss"][-LAST:])


def report(curves: dict[str, list[Curve]]) -> None:
    """Print the mean curve of each, the first step, and the mean loss of the last steps by seed."""
    print("step       " + "".join(f"{name:>12}" for name in curves))
    for step in range(0, STEPS, max(1, STEPS // 10)):
        means = [statistics.mean(curve["loss"][step] for curve in of_seeds) for of_seeds in curves.values()]
        print(f"{step + 1:>4}       " + "".join(f"{mean:>12.4f}" for mean in means))
    for name, of_seeds in curves.items():
        first = {kind: statistics.mean(curve[kind][0] for curve in of_seeds) for kind in ("loss", "grad_norm")}
        highest = max(max(curve["grad_norm"]) for curve in of_seeds)
        ends = [end_of(curve) for curve in of_seeds]
        print(
            f"{name}: first loss {first['loss']:.4f}, first gradient norm {first['grad_norm']:.4f}, highest "
            f"{highest:.1f}; mean loss of the last {LAST} steps {statistics.mean(ends):.4f} "
            f"(seeds: {', '.join(f'{end:.4f}' for end in ends)})"
        )


def main(python: str | None) -> None:
    curves = {"titan": [titan_curve(seed) for seed in SEEDS]}
    if python is not None:
        with tempfile.TemporaryDirectory() as folder:
            lr = write_rows(file := Path(folder, "rows.pt"))
            curves["torchtitan"] = [torchtitan_curve(python, file, lr, seed) for seed in SEEDS]
    report(curves)


if __name__ == "__main__":
    (python,) = [argument for argument in sys.argv[1:] if argument != "--toy"] or [None]
    if python is None and not TOY:
        raise SystemExit("Give the Python interpreter of an environment with torchtitan, or run nox -s learning_curve.")
    main(python)
