"""How a run ends: signals, failures, error reports, timeouts. With toy classes on forked ranks."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from titan_trainer import CrossEntropy, NonFiniteError, SingleReplica, Validator
from titan_trainer.errors import reported_errors
from titan_trainer.stop import StopRequest


def test_sigterm_during_the_last_save_does_not_lose_the_checkpoint(run_ranks, toy_config, toy):
    def terminated_twice():
        trainer = toy_config(checkpoint=toy.Checkpointer.Config(interval=100)).build()
        save = trainer.checkpointer.save

        def slow_save(step, parts, *, last=False):
            if last:
                os.kill(os.getpid(), signal.SIGTERM)
            return save(step, parts, last=last)

        trainer.checkpointer.save = slow_save
        trainer.train()
        return toy.Checkpointer.saved[str(trainer.config.dump_folder)][0]

    assert run_ranks(1, terminated_twice) == [10]


def test_sigterm_while_resuming_ends_the_run_before_the_first_step(run_ranks, toy_config, toy):
    def terminated_early():
        trainer = toy_config(checkpoint=toy.Checkpointer.Config()).build()
        resume = trainer.resume

        def interrupted_resume():
            os.kill(os.getpid(), signal.SIGTERM)
            resume()

        trainer.resume = interrupted_resume
        trainer.train()
        return trainer.step

    assert run_ranks(2, terminated_early) == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_validation_ends_it_within_a_batch_on_every_rank_and_saves(run_ranks, toy_config, toy, number):
    def stopped():
        config = toy_config(
            validator=Validator.Config(dataloader=toy.Loader.Config(), interval=2, tokens=100_000),
            checkpoint=toy.Checkpointer.Config(interval=100),
        )
        trainer = config.build()
        calls = []
        build_validator = trainer.build_validator

        def build_interrupted_validator():
            validator = build_validator()
            next_batches = validator.loader.next_batches

            def next_batches_and_signal(rank, num_ranks):
                calls.append(rank)
                if len(calls) == 3 and os.environ["RANK"] == "1":  # only one rank receives the signal
                    os.kill(os.getpid(), number)
                return next_batches(rank, num_ranks)

            validator.loader.next_batches = next_batches_and_signal
            return validator

        trainer.build_validator = build_interrupted_validator
        trainer.train()
        return trainer.step, len(calls), toy.Checkpointer.saved[str(config.dump_folder)][0]

    assert run_ranks(2, stopped) == [(2, 3, 2)] * 2
    lines = (toy_config().dump_folder / "metrics.jsonl").read_text().splitlines()
    assert ["validation_loss" in line for line in lines] == [False, False]


def test_the_last_save_tells_a_stopped_run_from_a_finished_one(run_ranks, toy_config, toy):
    def last_of_final_save(stop: bool, num_samples: int | None):
        config = toy_config(checkpoint=toy.Checkpointer.Config(), dataloader=toy.Loader.Config(num_samples=num_samples))
        trainer = config.build()
        saves = []

        def save(step, parts, *, last=False):
            saves.append(last)
            return True

        trainer.checkpointer.save = save
        if stop:
            trainer.after_step = lambda result: os.kill(os.getpid(), signal.SIGTERM)
        trainer.train()
        return saves[-1]

    def three_runs():
        return last_of_final_save(False, None), last_of_final_save(False, 30), last_of_final_save(True, None)

    assert run_ranks(1, three_runs) == [(True, True, "stopped")]


INTERRUPTED = """
import signal, sys
from titan_trainer.stop import StopRequest
with StopRequest() as request:
    print("ready", flush=True)
    while not request.received:
        signal.pause()
    print("first", flush=True)
    import threading
    threading.Event().wait()
"""


def test_a_second_interrupt_ends_the_run_at_once():
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in (b"ready\n", b"first\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert b"Interrupt again to end the run at once" in errors


def test_signal_handlers_are_restored_and_an_ignored_interrupt_stays_ignored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGINT) is not before[0]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert not request.received
    finally:
        signal.signal(signal.SIGINT, before[0])


class ClosingGroup(SingleReplica):
    """A replica group that records whether it was closed."""

    closed = False

    def close(self) -> None:
        ClosingGroup.closed = True


class NanLoss(CrossEntropy):
    """Cross-entropy that is nan from the first step on."""

    def __call__(self, head, hidden, targets):
        total, count = super().__call__(head, hidden, targets)
        return total * torch.nan, count


def test_a_failing_run_closes_its_replica_group_and_metrics(run_ranks, toy_config):
    def failing():
        trainer = toy_config(loss=NanLoss.Config(), replica_group=ClosingGroup.Config()).build()
        with pytest.raises(NonFiniteError):
            trainer.train()
        return ClosingGroup.closed, trainer.metrics.file.closed

    assert run_ranks(1, failing) == [(True, True)]


def test_the_report_of_a_non_finite_step_fits_on_a_screen_and_the_traceback_lists_all_samples(
    run_ranks, toy_config, toy, tmp_path, capfd
):
    def failing():
        config = toy_config(loss=NanLoss.Config())
        trainer = config.build()
        next_batches = trainer.loader.next_batches

        def batches_of_many_samples(rank, num_ranks):
            batches = next_batches(rank, num_ranks)
            for batch in batches:
                batch.sample_ids = [list(range(1000 * index, 1000 * index + 500)) for (index,) in batch.sample_ids]
            return batches

        trainer.loader.next_batches = batches_of_many_samples
        with pytest.raises(SystemExit), reported_errors(tmp_path):
            trainer.train()

    run_ranks(1, failing)
    report = capfd.readouterr().err
    assert "loss nan" in report
    assert "4000 samples" in report
    assert len(report) < 80 * 24
    assert "7499" in (tmp_path / "error_rank0.txt").read_text()


def test_an_error_of_all_ranks_is_printed_once(run_ranks, toy_config, tmp_path, capfd):
    def failing():
        trainer = toy_config(loss=NanLoss.Config()).build()
        with pytest.raises(SystemExit), reported_errors(tmp_path):
            trainer.train()

    run_ranks(2, failing)
    assert capfd.readouterr().err.count("loss nan") == 1
    reports = [(tmp_path / f"error_rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "samples: [0, 1, 2, 3]" in reports[0]
    assert "samples: [4, 5, 6, 7]" in reports[1]


def test_an_error_of_one_rank_is_printed_by_that_rank(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit), reported_errors(tmp_path):
        raise OSError("No such disk.")
    assert "[rank 3] error: No such disk." in capsys.readouterr().err


def test_an_error_is_reported_even_if_the_dump_folder_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "a file"
    file.write_text("")
    with pytest.raises(SystemExit) as end, reported_errors(file):
        raise ValueError("x must be 1, got 2.")
    assert end.value.code == 1
    assert "x must be 1, got 2." in capsys.readouterr().err


def record_timeouts(monkeypatch) -> list[float]:
    timeouts = []
    monkeypatch.setattr("titan_trainer.trainer.set_collective_timeout", lambda dims, seconds: timeouts.append(seconds))
    return timeouts


def test_the_first_step_and_validations_have_the_longer_collective_timeout(run_ranks, toy_config, toy, monkeypatch):
    timeouts = record_timeouts(monkeypatch)

    def train():
        config = toy_config(validator=Validator.Config(dataloader=toy.Loader.Config(num_samples=20), interval=4))
        config.training.steps = 4
        trainer = config.build()
        during = []
        validate = Validator.validate
        monkeypatch.setattr(Validator, "validate", lambda self: during.append(timeouts[-1]) or validate(self))
        after_step, after = trainer.after_step, []
        trainer.after_step = lambda result: (after_step(result), after.append(timeouts[-1]))
        trainer.train()
        return during, after

    assert run_ranks(1, train) == [([300], [100] * 4)]


class HealsFirst(SingleReplica):
    """A replica group that heals a joining replica to step 6 before its first step."""

    def register_state(self, state_dict, load_state_dict, step=0, identity=None) -> None:
        self.load_state_dict, self.state = load_state_dict, {"trainer": {"step": 6}}

    def begin_step(self) -> tuple[int, int]:
        if self.state is not None:
            self.load_state_dict(self.state)
            self.state = None
        return 0, 1


def test_a_healed_replica_switches_to_the_shorter_timeout_after_its_first_step(run_ranks, toy_config, monkeypatch):
    timeouts = record_timeouts(monkeypatch)

    def train():
        trainer = toy_config(replica_group=HealsFirst.Config()).build()
        trainer.train()
        return trainer.step, timeouts

    assert run_ranks(1, train) == [(10, [100])]


def test_an_error_in_building_the_validator_creates_no_dump_folder(run_ranks, toy_config, toy):
    class Missing(toy.Loader):
        class Config(toy.Loader.Config): ...

        def __init__(self, config, **more) -> None:
            raise FileNotFoundError("missing.jsonl")

    def build():
        config = toy_config(validator=Validator.Config(dataloader=Missing.Config()))
        with pytest.raises(FileNotFoundError):
            config.build().train()
        return config.dump_folder.exists()

    assert run_ranks(1, build) == [False]
