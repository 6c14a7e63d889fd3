"""The recipe as people run it: what it leaves, how it stops, what it says about bad input; each case a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
RECIPE = REPO / "recipes" / "llama3_debug.py"
SMALL = {
    "model.num_layers": 1,
    "model.dim": 32,
    "model.block.attention.num_heads": 2,
    "model.block.attention.num_kv_heads": 2,
    "model.block.feed_forward.hidden_dim": 64,
    "training.seq_len": 32,
    "training.global_batch_size": 4,
    "training.local_batch_size": 2,
    "training.steps": 4,
    "validator": None,
    "metrics.log_freq": 1,
}
SMALL_FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}


def run(folder: Path, *flags: str | Path, recipe: Path = RECIPE) -> subprocess.CompletedProcess:
    """Run the recipe, small, in an empty folder; flags given later win."""
    command = [sys.executable, recipe, *SMALL_FLAGS, "--dump_folder", folder / "run", *flags]
    return subprocess.run(map(str, command), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def jsonl(folder: Path, *lines: str) -> list[str]:
    file = folder / "text.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return ["--dataloader.source.path", str(file)]


GOOD_LINE = json.dumps({"text": "It is a truth universally acknowledged. " * 20})


def test_a_run_leaves_its_config_metrics_picture_and_checkpoint_and_says_where(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    for name in ("checkpoint/step-4/manifest.json", "config.json", "loss.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    for name in ("checkpoint", "metrics.jsonl", "config.json", "loss.png"):
        assert str(tmp_path / "run" / name) in result.stdout
    again = run(tmp_path, "--training.steps", "6")
    assert again.returncode == 0, again.stderr
    assert "resuming after step 4" in again.stdout
    assert "training.steps: 4 -> 6" in again.stdout
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_saved_config_runs_again(tmp_path):
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    command = [sys.executable, RECIPE, "--config", tmp_path / "run/config.json", "--dump_folder", tmp_path / "second"]
    result = subprocess.run(map(str, command), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    second = [json.loads(line)["loss"] for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert second == [record["loss"] for record in records(tmp_path)]


BAD_FLAGS = {
    "a misspelt flag": (["--trainign.steps", "3"], ["--trainign.steps", "--training.steps"]),
    "a value of the wrong type": (["--training.steps", "many"], ["training.steps", "many", "int"]),
    "negative steps": (["--training.steps", "-3"], ["training.steps must be at least 1, got -3"]),
    "a batch of 0": (["--training.global_batch_size", "0"], ["global_batch_size must be at least 1, got 0"]),
    "a choice that does not exist": (["--optimizer", "AdamV"], ["AdamV", "AdamW"]),
    "a wrong literal": (["--lr_scheduler.decay_type", "cosin"], ["decay_type", "cosin", "cosine"]),
    "more tensor ranks than ranks": (
        ["--parallelism.tensor_parallel_degree", "2"],
        ["tensor_parallel_degree", "2", "1"],
    ),
    "degrees whose product is not the world": (["--parallelism.data_parallel_shard_degree", "3"], ["3", "1"]),
    "a missing tokenizer": (["--tokenizer.path", "nowhere.tiktoken"], ["nowhere.tiktoken"]),
    "a missing data file": (["--dataloader.source.path", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "a tokenizer beyond the vocabulary": (["--model.vocab_size", "2000"], ["2048", "2000"]),
    "a missing config file": (["--config", "nowhere.json"], ["nowhere.json"]),
}


def assert_short_error(result: subprocess.CompletedProcess, words: list[str]) -> None:
    output = result.stdout + result.stderr
    assert result.returncode not in (0, None), output
    assert "Traceback" not in output, output
    assert len(output.splitlines()) <= 40, output
    for word in words:
        assert word in output, (word, output)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (index % 2)) for index, name in enumerate(BAD_FLAGS)]
)
def test_bad_flags_end_with_one_short_error(tmp_path, name):
    flags, words = BAD_FLAGS[name]
    assert_short_error(run(tmp_path, *flags), words)
    assert not (tmp_path / "run" / "checkpoint").exists() or not any((tmp_path / "run" / "checkpoint").glob("step-*"))


def test_heads_that_tensor_ranks_do_not_divide_are_told_above_the_launchers_own_words(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    heads = ["--model.block.attention.num_heads", "3", "--model.block.attention.num_kv_heads", "3"]
    flags = [*SMALL_FLAGS, *heads, "--parallelism.tensor_parallel_degree", "2", "--dump_folder", tmp_path / "run"]
    command = map(str, [*launcher, RECIPE, *flags])
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    own_words, _, _ = result.stderr.partition("Traceback")
    assert "must divide num_heads (3)" in own_words, result.stderr
    assert "got 2. Use 1 or 3" in own_words, result.stderr


BAD_DATA = {
    "bad JSON": ([GOOD_LINE, '{"text": "cut'], ["text.jsonl", "2"]),
    "a record without the text": ([GOOD_LINE, '{"title": "Emma"}'], ["text.jsonl", "2", "text", "title"]),
    "an empty file": ([], ["text.jsonl"]),
    "only empty texts": (['{"text": ""}', '{"text": ""}'], ["text.jsonl"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_ends_with_one_short_error(tmp_path, name):
    lines, words = BAD_DATA[name]
    assert_short_error(run(tmp_path, *jsonl(tmp_path, *lines)), words)


def test_a_malformed_tokenizer_is_named_with_its_line(tmp_path):
    file = tmp_path / "bad.tiktoken"
    file.write_text("IQ== 0\nthis is no rank\n")
    assert_short_error(run(tmp_path, "--tokenizer.path", str(file)), ["bad.tiktoken", "2"])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = run(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def resumed_folder(finished_run, tmp_path) -> Path:
    shutil.copytree(finished_run / "run", tmp_path / "run")
    return tmp_path


CHANGED_SETTINGS = {
    "sequence length": (["--training.seq_len", "64"], ["seq_len", "32", "64"]),
    "global batch": (["--training.global_batch_size", "8"], ["global_batch_size", "4", "8"]),
    "data": (["--dataloader.source.path", str(REPO / "recipes/assets/austen/validation.jsonl")], ["source"]),
    "tokenizer": (["--tokenizer", "ByteTokenizer"], ["tokenizer"]),
    "another model": (["--model.dim", "64"], ["dim", "32", "64"]),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.full] * (n in ("sequence length", "another model", "data")))
        for n in CHANGED_SETTINGS
    ],
)
def test_a_resume_with_changed_settings_is_refused_and_damages_nothing(resumed_folder, name):
    flags, words = CHANGED_SETTINGS[name]
    before = {path: path.read_bytes() for path in sorted((resumed_folder / "run").rglob("*")) if path.is_file()}
    assert_short_error(run(resumed_folder, "--training.steps", "6", *flags), words)
    after = {path: path.read_bytes() for path in before}
    assert after == before
    assert run(resumed_folder, "--training.steps", "5").returncode == 0


def test_a_resume_with_another_batch_goes_on_when_asked_for(resumed_folder):
    flags = ["--training.steps", "6", "--training.seq_len", "64", "--dataloader.allow_changes", "True"]
    result = run(resumed_folder, *flags)
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in records(resumed_folder)] == [1, 2, 3, 4, 5, 6]


def test_a_resume_with_fewer_steps_than_are_done_says_that_none_is_left(resumed_folder):
    result = run(resumed_folder, "--training.steps", "2")
    assert result.returncode == 0, result.stderr
    assert "resuming after step 4" in result.stdout
    assert "no steps left: training.steps is 2" in result.stdout
    assert [record["step"] for record in records(resumed_folder)] == [1, 2, 3, 4]


BAD_CONFIGS = {
    "an unknown key": (lambda data: data["training"].update(stepz=3), ["stepz", "steps"]),
    "a type outside the allow-list": (lambda data: data["optimizer"].update({"$type": "os:system"}), ["os:system"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_file_is_refused(finished_run, tmp_path, name):
    spoil, words = BAD_CONFIGS[name]
    data = json.loads((finished_run / "run" / "config.json").read_text())
    spoil(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    assert_short_error(run(tmp_path, "--config", tmp_path / "bad.json"), words)


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, RECIPE, *SMALL_FLAGS, "--dump_folder", folder / "run", *flags]
    return subprocess.Popen(
        map(str, command), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
            return
    raise AssertionError(f"The run ended before step {step}: {process.stderr.read()}")


def test_sigterm_finishes_the_step_saves_and_exits_with_0(tmp_path):
    process = start(tmp_path, "--training.steps", "100000")
    wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    last = records(tmp_path)[-1]["step"]
    assert f"Stopped by a signal after step {last} of 100000. Run the same command again to resume." in output
    assert (tmp_path / "run" / "checkpoint" / f"step-{last}" / "manifest.json").exists()


@pytest.mark.parametrize("delay_s", [0.05, *(pytest.param(delay_s, marks=pytest.mark.full) for delay_s in (0.0, 0.3))])
def test_kill_9_while_saving_resumes_from_the_newest_whole_checkpoint(tmp_path, delay_s):
    process = start(
        tmp_path, "--training.steps", "100000", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "3"
    )
    wait_for_step(process, 4)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    step = records(tmp_path)[-1]["step"] + 2
    result = run(tmp_path, "--training.steps", str(step))
    assert result.returncode == 0, result.stderr
    assert "resuming after step" in result.stdout
    assert [record["step"] for record in records(tmp_path)] == list(range(1, step + 1))


@pytest.mark.parametrize("damage", ["flip", *(pytest.param(d, marks=pytest.mark.full) for d in ("truncate", "delete"))])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, damage):
    assert run(tmp_path, "--checkpoint.interval", "2").returncode == 0
    file = next((tmp_path / "run" / "checkpoint" / "step-4").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    result = run(tmp_path, "--training.steps", "5")
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stdout
    assert "step-4" in result.stderr + result.stdout
    assert file.name in result.stderr + result.stdout
