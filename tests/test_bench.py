"""Every script of bench/ runs, at the size of a toy, in a fork of this process."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
PRINTED = {
    "bare": "",
    "checkpoint": "a synchronous save adds",
    "data": "documents (one of 4 MB)",
    "experts": "toy: grouped",
    "learning_curve": "titan: first loss",
    "moe_speed": "float32, CPU time: titan",
    "parallel_overhead": "TP with SP, two ranks: titan",
    "startup": "import titan_config",
    "train_speed": "float32, CPU time: titan",
}
SHARED = {"sizes", "interleaved"}


def run_script(name: str, output: Path) -> None:
    os.chdir(output.parent)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.path.insert(0, str(BENCH))
    sys.argv = [str(BENCH / f"{name}.py"), "--toy"]
    runpy.run_path(sys.argv[0], run_name="__main__")


SLOW = {"startup", "parallel_overhead"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in SLOW)) for name in PRINTED])
def test_a_script_of_bench_runs(name, tmp_path):
    assert not torch.distributed.is_initialized(), "The fork would wait in a process group without its threads."
    process = multiprocessing.get_context("fork").Process(target=run_script, args=(name, tmp_path / "output"))
    process.start()
    process.join()
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    assert PRINTED[name] in output


def test_every_script_of_bench_is_among_them():
    assert {path.stem for path in BENCH.glob("*.py")} == set(PRINTED) | SHARED
