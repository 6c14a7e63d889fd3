"""Learning curves of the Llama 3 debug models of Titan and torchtitan, on the same batches, for several seeds.

`python bench/learning_curve.py PYTHON`: PYTHON is the interpreter of an environment with torchtitan (`nox -s
learning_curve` creates one). fp32, batches of 8 sequences of 256 tokens, one process. Prints both mean curves and the
final loss of each seed.
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
BATCH_SIZE, SEQ_LEN, WARMUP = 8, 256, 5
Curve = dict[str, list[float]]
"""The loss and the gradient norm of each step."""


def config_of(folder: Path) -> Any:
    config = runpy.run_path(str(RECIPES / "llama3_debug.py"))["llama3_debug"]()
    config.training.steps, config.training.seq_len = STEPS, SEQ_LEN
    config.training.local_batch_size = config.training.global_batch_size = BATCH_SIZE
    config.lr_scheduler.warmup_steps = WARMUP
    config.validator = config.checkpoint = None
    config.dump_folder = folder
    return config


def titan_curve(seed: int) -> Curve:
    """Train with Titan's trainer and return the curve; `seed` changes the initial weights, not the data."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = config_of(Path(folder)).build()
        trainer.model.init_weights(seed)
        trainer.train()
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm")}


def torchtitan_curve(python: str, batches: Path, lr: float, seed: int) -> Curve:
    command = [python, str(PEER), str(batches), str(seed), str(lr), str(WARMUP)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def write_batches(file: Path) -> float:
    """Write the batches that the trainer trains on, and return its learning rate."""
    config = config_of(file.parent)
    loader = config.dataloader.build(
        tokenizer=config.tokenizer.build(),
        seq_len=SEQ_LEN,
        global_batch_size=BATCH_SIZE,
        local_batch_size=BATCH_SIZE,
        seed=config.debug.seed,
    )
    batches = []
    for _ in range(STEPS):
        (batch,) = loader.next_batches(0, 1)
        loader.commit(loader.cursor_delta())
        batches.append({**batch.inputs, **batch.targets})
    torch.save(batches, file)
    return config.optimizer.lr


def final_loss(curve: Curve) -> float:
    return statistics.mean(curve["loss"][-LAST:])


def report(curves: dict[str, list[Curve]]) -> None:
    """Print a table of the mean curves; then first step, highest gradient norm, and final loss by seed."""
    print("step       " + "".join(f"{name:>12}" for name in curves))
    for step in range(0, STEPS, max(1, STEPS // 10)):
        means = [statistics.mean(curve["loss"][step] for curve in of_seeds) for of_seeds in curves.values()]
        print(f"{step + 1:>4}       " + "".join(f"{mean:>12.4f}" for mean in means))
    for name, of_seeds in curves.items():
        first = {kind: statistics.mean(curve[kind][0] for curve in of_seeds) for kind in ("loss", "grad_norm")}
        highest = max(max(curve["grad_norm"]) for curve in of_seeds)
        finals = [final_loss(curve) for curve in of_seeds]
        print(
            f"{name}: first loss {first['loss']:.4f}\n"
            f"  first gradient norm {first['grad_norm']:.4f}, highest {highest:.1f}\n"
            f"  mean loss of the last {LAST} steps {statistics.mean(finals):.4f}\n"
            f"  by seed: {', '.join(f'{loss:.4f}' for loss in finals)}"
        )


def main(python: str | None) -> None:
    curves = {"titan": [titan_curve(seed) for seed in SEEDS]}
    if python is not None:
        with tempfile.TemporaryDirectory() as folder:
            lr = write_batches(file := Path(folder, "batches.pt"))
            curves["torchtitan"] = [torchtitan_curve(python, file, lr, seed) for seed in SEEDS]
    report(curves)


if __name__ == "__main__":
    (python,) = [argument for argument in sys.argv[1:] if argument != "--toy"] or [None]
    if python is None and not TOY:
        raise SystemExit("PYTHON must be an interpreter with torchtitan, got none. Run `nox -s learning_curve`.")
    main(python)
