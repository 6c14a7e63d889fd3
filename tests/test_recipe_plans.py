"""Public recipes use the GPUs that their docstrings name: memory, communication and bubbles, by their plans."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from titan_parallel import FullActivationCheckpoint, Plan

RECIPES = Path(__file__).parent.parent / "recipes"
NAMES = [
    "llama3_8b",
    "llama3_70b",
    "llama3_405b",
    "qwen3_0_6b",
    "qwen3_8b",
    "qwen3_30b_a3b",
    "deepseek_v2_lite_16b",
    "deepseek_v3_671b",
    "llama4_scout",
    "llama4_maverick",
    "gpt_oss_20b",
    "gpt_oss_120b",
]
BY_DEFAULT = "llama3_8b"
WITHIN_A_NODE, BETWEEN_NODES = 350e9, 50e9
"""Bytes a second of a GPU, each way: NVLink, and one network card of 400 Gbit/s for each GPU."""
FLOPS = 450e12
"""A second, of an H100 in bf16 as large models reach it."""
WITHOUT_EXPERT_PARALLELISM = {"deepseek_v3_671b", "llama4_maverick", "gpt_oss_120b"}
"""They gather or split the weights of so many experts that no mesh hides it; their docstrings say so."""
BESIDE = {"dp_shard", "dp_replicate", "dp_replicate x dp_shard"}
"""Axes whose collectives run beside the computation. Ranks wait for those of other axes."""


def plan_of(name: str, folder: Path) -> Plan:
    """The plan of a recipe on the GPUs that its docstring names."""
    text = (RECIPES / f"{name}.py").read_text()
    count, memory = re.search(r"(\d+) GPUs of (\d+) GiB", text).groups()
    nodes, ranks = re.search(r"torchrun (?:--nnodes (\d+) )?--nproc-per-node (\d+)", text).groups()
    assert int(nodes or 1) * int(ranks) == int(count)
    flags = ["--plan", "--json", "--world-size", count, "--device-memory", f"{memory}GiB"]
    command = [sys.executable, str(RECIPES / f"{name}.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Plan.from_json(result.stdout)


def waiting(plan: Plan, *, recomputes: bool) -> float:
    """The time that a step waits for communication, over that of its computation."""
    crosses = {axis.name: axis.nodes > 1 for axis in plan.mesh}
    compute = (4 / 3 if recomputes else 1) * plan.flops.causal_per_step / plan.world_size / FLOPS

    def seconds(entry) -> float:
        is_far = any(crosses[axis] for axis in entry.axis.split(" x "))
        share = 2 if entry.kind == "all_reduce" else 1  # there and back
        return share * entry.bytes / (BETWEEN_NODES if is_far else WITHIN_A_NODE)

    def of_stage(stage) -> float:
        beside = sum(seconds(entry) for entry in stage.collectives if entry.axis in BESIDE)
        in_line = sum(seconds(entry) for entry in stage.collectives if entry.axis not in BESIDE)
        return in_line + max(0.0, beside - compute)

    return max(map(of_stage, plan.stages)) / compute


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n != BY_DEFAULT)) for n in NAMES])
def test_a_recipe_fills_its_gpus_and_does_not_wait(recipe, name, tmp_path):
    recomputes = isinstance(getattr(recipe(name), name)().activation_checkpoint, FullActivationCheckpoint.Config)
    plan = plan_of(name, tmp_path)
    assert plan.peak <= 0.9 * plan.device_memory
    assert (plan.bubble or 0) < 0.1
    if name in WITHOUT_EXPERT_PARALLELISM:
        assert waiting(plan, recomputes=recomputes) >= 0.2  # else it belongs with the others
        return
    assert plan.peak >= 0.6 * plan.device_memory
    assert waiting(plan, recomputes=recomputes) < 0.2
    assert plan.warnings == []


def test_every_public_recipe_is_planned():
    assert {path.stem for path in RECIPES.glob("*.py") if "_debug" not in path.stem} - {"loop"} == set(NAMES)
