"""`--plan`: what a recipe's run would be, against what it is; the command line as people type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from titan_parallel import Plan
from titan_trainer.planning import parse_plan_arguments, plan_run
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).parent.parent
KINDS = {"all_gather": "gather", "reduce_scatter": "scatter", "all_reduce": "reduce"}


class Counted(TorchDispatchMode):
    """Collectives by kind: how many, and the bytes of their larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        kind = next((kind for kind in KINDS.values() if kind in str(function)), None)
        if "c10d" in str(function) and kind is not None:
            leaves = tree_leaves((args, result))
            texts = [leaf for leaf in leaves if isinstance(leaf, str)]
            objects = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            resolve = dist.distributed_c10d._resolve_process_group
            group = dist.ProcessGroup.unbox(objects[0]) if objects else resolve(texts[-1])
            if group.size() > 1:
                self.calls[kind] += 1
                self.bytes[kind] += max(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def real_step(config):
    """Return the collectives of the second step of a Trainer, and the bytes of its optimizer state."""
    trainer = config.build()
    trainer.train_step()
    with Counted() as counted:
        trainer.agree(False)
        trainer.train_step()
    tensors = [value for state in trainer.optimizer.state_dict().values() for value in state.values()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return counted.calls, counted.bytes, sum(tensor.nbytes for tensor in local)


def test_the_plan_of_a_run_counts_all_that_a_step_of_its_trainer_sends(small_run, run_ranks):
    configs = [small_run(), small_run(changes={"parallelism.tensor_parallel_degree": 2})]
    for config, real in zip(configs, run_ranks(2, lambda: list(map(real_step, configs)))[0], strict=True):
        stage = plan_run(config, 2).stages[0]
        calls, nbytes = Counter(), Counter()
        for entry in stage.collectives:
            calls[KINDS[entry.kind]] += entry.calls
            nbytes[KINDS[entry.kind]] += entry.bytes
        assert (calls, nbytes, stage.optimizer) == real


def test_flops_are_those_the_model_states(small_run):
    config = small_run()
    made, stated = plan_run(config, 1), config.model.flops_per_token(config.training.seq_len)
    assert (made.flops.full_per_token, made.flops.causal_per_token) == (stated.full, stated.causal)
    assert made.tokens_per_step == config.training.global_batch_size * config.training.seq_len


def run(folder: Path, recipe: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "recipes" / f"{recipe}.py"), "--plan", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_recipe_is_planned_from_its_command_line_and_leaves_nothing(tmp_path):
    flags = ["--world-size", "16", "--device-memory=80GiB", "--training.seq_len", "4096", "--json"]
    result = run(tmp_path, "llama3_8b", *flags)
    assert result.returncode == 0, result.stderr
    made = Plan.from_json(result.stdout)
    assert json.loads(made.to_json()) == json.loads(result.stdout)
    assert (made.world_size, made.num_parameters, made.fits) == (16, 8_030_261_248, True)
    assert made.tokens_per_step == 128 * 4096
    assert made.stages[0].parameters == pytest.approx(4 * made.num_parameters / 16, rel=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_ends_with_code_1_and_says_what_would(tmp_path):
    result = run(tmp_path, "llama3_debug", "--world-size", "2", "--device-memory", "200MiB")
    assert result.returncode == 1, result.stderr
    assert "Does not fit 200 MiB" in result.stdout and "(fits) with activation_checkpoint" in result.stdout


BAD = {
    "": "--world-size must be a number of ranks, at least 1, with --plan, got none.",
    "--world-size many": "--world-size must be a number of ranks, at least 1, with --plan, got many.",
    "--world-size 0": "--world-size must be a number of ranks, at least 1, with --plan, got 0.",
    "--world-size 2 --device-memory": "--device-memory must be the memory of one device, such as 80GiB, got none.",
    "--world-size 2 --device-memory lots": "got 'lots'. Write 80GiB",
    "--world-size 3": "training.global_batch_size must be a multiple of 24 (3 data-parallel ranks with",
    "--world-size 3 --parallelism.tensor_parallel_degree 2": "must divide the number of ranks (3), got 2.",
    "--world-size 2 --optimzer.lr 1": "Unknown flag --optimzer.lr.",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_with_code_2_and_three_sentences(recipe, capsys, flags):
    debug = recipe("llama3_debug")
    with pytest.raises(SystemExit) as ended:
        debug.main(debug.llama3_debug, ["--plan", *flags.split()])
    assert ended.value.code == 2
    assert BAD[flags] in capsys.readouterr().err


def test_the_words_of_a_plan_are_taken_out_of_the_recipes():
    words = ["--optimizer.lr", "1e-3", "--plan", "--world_size=8", "--json", "--training.steps", "5"]
    arguments = parse_plan_arguments(words)
    assert (arguments.world_size, arguments.json, arguments.device_memory) == (8, True, None)
    assert arguments.rest == ["--optimizer.lr", "1e-3", "--training.steps", "5"]
