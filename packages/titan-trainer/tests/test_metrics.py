"""Metrics: the records of a run, their timing, and how a resumed run continues them."""

import json
from types import SimpleNamespace

import pytest
from titan_config import ConfigError
from titan_trainer import Metrics, TensorBoard
from titan_trainer.metrics import open_after_step, read_metrics

STEP = {"loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100, "memory_gib": 1.0}


def build(folder, first_step=0, steps=10, is_first_rank=True, seconds_per_token_at_peak=None, **settings) -> Metrics:
    folder.mkdir(exist_ok=True)
    return Metrics.Config(**settings).build(
        dump_folder=folder,
        first_step=first_step,
        steps=steps,
        seconds_per_token_at_peak=seconds_per_token_at_peak,
        is_first_rank=is_first_rank,
    )


@pytest.fixture
def clock(monkeypatch):
    """A fake clock for the records, set by `clock.now` in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("titan_trainer.metrics.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def record_steps(metrics: Metrics, *steps: int) -> None:
    for step in steps:
        metrics.stop_clock()
        metrics.record_step(step, **STEP)
    metrics.close()


def test_validation_loss_is_in_the_record_of_its_step_and_its_time_in_no_step(tmp_path, clock):
    metrics = build(tmp_path)
    clock.now += 2
    metrics.stop_clock()
    clock.now += 30
    metrics.record_step(1, validation_loss=2.0, **STEP)
    clock.now += 3
    record_steps(metrics, 2)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["validation_loss"]) == (1, 1.0, 2.0)
    assert "validation_loss" not in second
    assert (first["seconds"], second["seconds"]) == (2, 3)


def test_an_incomplete_last_record_is_skipped_when_reading_and_dropped_on_resume(tmp_path):
    record_steps(build(tmp_path), 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    record_steps(build(tmp_path, first_step=3), 4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_resume_truncates_the_records_of_later_steps_without_rewriting_the_others(tmp_path):
    record_steps(build(tmp_path), 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    before, file = path.read_bytes(), path.stat().st_ino
    build(tmp_path, first_step=2).close()
    assert path.read_bytes() == before[: before.index(b'{"step": 3')]
    assert path.stat().st_ino == file


def test_time_left_is_estimated_from_the_steps_of_this_process(tmp_path, capsys, clock):
    metrics = build(tmp_path, steps=1001)
    clock.now += 0.05
    record_steps(metrics, 501)  # healed from a replica that had done 500 steps
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[-2] == "25s"


def test_mfu_is_divided_by_the_number_of_replicas(tmp_path):
    metrics = build(tmp_path, seconds_per_token_at_peak=1e-6)
    metrics.stop_clock()
    metrics.record_step(1, num_replicas=2, **STEP)
    metrics.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 1e-6 / 2)


def test_only_the_first_rank_writes(tmp_path):
    record_steps(build(tmp_path, is_first_rank=False), 1, 2)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_has_every_step_of_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = [TensorBoard.Config()]
    record_steps(build(tmp_path, sinks=sinks), 1, 2, 3, 4)
    record_steps(build(tmp_path, first_step=3, sinks=sinks), 4, 5)  # resumed from the checkpoint of step 3
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in map(json.loads, (tmp_path / "metrics.jsonl").open())] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", [b"\xff{\n", b"{}\n", b"5\n"])
def test_an_invalid_line_is_reported_and_the_file_unchanged(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b'{"step": 3}\n'
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2 must be a metrics record"):
        open_after_step(path, 3)
    assert path.read_bytes() == content
