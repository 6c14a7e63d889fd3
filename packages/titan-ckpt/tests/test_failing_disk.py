"""A failing disk is retried and reported, and damages neither a valid checkpoint nor the run."""

import errno
import io
import os
import threading
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from titan_ckpt import Checkpointer, CheckpointError, check_whole


class Part:
    def __init__(self, value=0):
        self.w = torch.full((1000,), float(value))

    def state_dict(self):
        return {"w": self.w}

    def load_state_dict(self, state):
        pass


def build(folder, **settings):
    return Checkpointer.Config(**{"interval": 1, **settings}).build(dump_folder=folder)


@pytest.fixture
def checkpoints(tmp_path):
    with closing(build(tmp_path, async_mode="disabled")) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"part": Part(step)})
    return tmp_path / "checkpoint"


def failing(monkeypatch, function, error, name, times=1 << 30):
    """Make `os.<function>` fail for paths that end in `name`; return the list of its failures."""
    original, failures = getattr(os, function), []

    def fail(path, *args, **kwargs):
        if str(path).endswith(name) and len(failures) < times:
            failures.append(path)
            raise OSError(error, os.strerror(error), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, function, fail)
    return failures


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-00000.safetensors"])
def test_an_unreadable_checkpoint_stops_the_run_and_keeps_its_name(checkpoints, monkeypatch, error, name):
    failures = failing(monkeypatch, "open", error, f"step-2/{name}")
    message = rf"step-2/{name} must be readable, got .* in 4 attempts"
    with closing(build(checkpoints.parent)) as checkpointer, pytest.raises(CheckpointError, match=message):
        checkpointer.load({"part": Part()})
    assert len(failures) == 4
    monkeypatch.undo()
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-1", "step-2"]
    assert check_whole(checkpoints / "step-2").step == 2


def test_a_temporary_failure_is_retried(checkpoints, monkeypatch):
    failures = failing(monkeypatch, "open", errno.ESTALE, "step-2/tensors.json", times=2)
    with closing(build(checkpoints.parent)) as checkpointer:
        assert checkpointer.load({"part": Part()}) == 2
    assert len(failures) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_open_of_a_tensor_file_is_retried(checkpoints, monkeypatch, number):
    """A tensor file is opened to check its header, and to load from it."""
    opened, original = [], io.open

    def fail(path, *args, **kwargs):
        if str(path).endswith("step-2/rank-00000.safetensors"):
            opened.append(path)
            if len(opened) == number:
                raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, *args, **kwargs)

    part = Part()
    with closing(build(checkpoints.parent)) as checkpointer:
        monkeypatch.setattr(io, "open", fail)
        assert checkpointer.load({"part": part}) == 2
    assert len(opened) > number
    assert part.w.eq(2).all()


def test_a_failure_on_one_rank_stops_all_with_the_same_message(run_ranks, checkpoints, monkeypatch):
    def load(failing_rank, name):
        with closing(build(checkpoints.parent)) as checkpointer:
            if dist.get_rank() == failing_rank:
                failing(monkeypatch, "open", errno.EIO, name)
            with pytest.raises(CheckpointError) as caught:
                checkpointer.load({"part": Part()})
            monkeypatch.undo()
        return str(caught.value)

    for rank, name in [(0, "step-2/manifest.json"), (1, "step-2/tensors.json")]:
        for message in run_ranks(2, load, rank, name):
            assert f"{name} must be readable, got [Errno 5] Input/output error" in message
    assert (checkpoints / "step-2").is_dir()


def fail_to_write(monkeypatch, *steps):
    """Make writes of the tensors of these steps fail, once for each occurrence of a step."""
    left, original = list(steps), os.open

    def fail(path, *args, **kwargs):
        for step in left:
            if f"step-{step}.saving-" in str(path) and str(path).endswith(".safetensors"):
                left.remove(step)
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


def test_a_save_that_failed_once_is_retried_with_the_same_values(tmp_path, monkeypatch, caplog):
    part = Part(1)
    with closing(build(tmp_path)) as checkpointer:
        fail_to_write(monkeypatch, 1)
        checkpointer.save(1, {"part": part})
        part.w.fill_(-1)
        checkpointer.wait()
        checkpointer.load({"part": part})
    assert part.w.eq(1).all()
    assert names(tmp_path) == ["step-1"], "the files of the first attempt are deleted"
    assert "Attempt 1 of 2" in caplog.text


def test_a_failed_save_is_logged_at_once_and_the_run_continues(run_ranks, tmp_path, monkeypatch, caplog):
    def train():
        logged = threading.Event()
        caplog.handler.emit = lambda record: logged.set() if "Attempt 2 of 2" in record.getMessage() else None
        if dist.get_rank() == 1:
            fail_to_write(monkeypatch, 2, 2, 6, 6)
        with closing(build(tmp_path, interval=2)) as checkpointer:
            for step in range(1, 7):
                checkpointer.save(step, {"part": Part(step), f"rank{dist.get_rank()}": Part(step)})
                if step == 2 and dist.get_rank() == 0:
                    assert logged.wait(60), "the background thread must log before the next save"
                if step == 4:
                    checkpointer.wait()
                    freed = names(tmp_path)
            with pytest.raises(CheckpointError, match=r"Saving step 6 .*No space left on device"):
                checkpointer.wait()
        return freed

    assert run_ranks(2, train) == [["step-4"]] * 2
    assert names(tmp_path) == ["step-4"]


def test_the_run_ends_after_max_failed_saves_consecutive_failures(tmp_path, monkeypatch):
    fail_to_write(monkeypatch, 1, 1, 3, 3, 4, 4)
    checkpointer = build(tmp_path, max_failed_saves=2)
    for step in range(1, 5):  # step 2 succeeds and resets the count
        checkpointer.save(step, {"part": Part(step)})
    with pytest.raises(CheckpointError, match=r"2 consecutive saves failed, the last with: .*step 4"):
        checkpointer.save(5, {"part": Part(5)})
    checkpointer.close()
    assert names(tmp_path) == ["step-2"]


def test_the_last_save_is_attempted_after_any_failures_and_must_succeed(tmp_path, monkeypatch):
    for folder, failures in (("fine", [1, 1]), ("not", [1, 1, 2, 2])):
        with closing(build(tmp_path / folder, max_failed_saves=1)) as checkpointer, monkeypatch.context() as patch:
            fail_to_write(patch, *failures)
            checkpointer.save(1, {"part": Part(1)})
            if folder == "fine":
                assert checkpointer.save(2, {"part": Part(2)}, last=True)
            else:
                with pytest.raises(CheckpointError, match="Saving step 2 "):
                    checkpointer.save(2, {"part": Part(2)}, last=True)
    assert names(tmp_path / "fine") == ["step-2"]
    assert names(tmp_path / "not") == []


def test_close_raises_the_error_of_a_failed_save(tmp_path, monkeypatch):
    fail_to_write(monkeypatch, 1, 1)
    checkpointer = build(tmp_path)
    checkpointer.save(1, {"part": Part(1)})
    with pytest.raises(CheckpointError, match="Saving step 1 "):
        checkpointer.close()


def test_an_unlistable_folder_at_a_due_save_does_not_end_the_run(tmp_path, monkeypatch):
    with closing(build(tmp_path, keep_latest_k=None)) as checkpointer:
        checkpointer.save(1, {"part": Part(1)})
        checkpointer.wait()
        with monkeypatch.context() as patch:
            for function in ("listdir", "scandir"):
                failing(patch, function, errno.EIO, "/checkpoint")
            checkpointer.save(2, {"part": Part(2)})
            with pytest.raises(CheckpointError, match=r"must be at least 2, .*, got 1\."):
                checkpointer.save(1, {"part": Part(1)})
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_save_whose_new_name_could_not_be_flushed_is_published_once(tmp_path, monkeypatch, caplog, times):
    original, failures = os.fsync, []

    def fail(descriptor):
        if os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "checkpoint")) and len(failures) < times:
            failures.append(names(tmp_path))
            raise OSError(errno.EIO, "Input/output error")
        return original(descriptor)

    with closing(build(tmp_path)) as checkpointer:
        monkeypatch.setattr(os, "fsync", fail)
        checkpointer.save(1, {"part": Part(1)})
        assert checkpointer.save(2, {"part": Part(2)}, last=True)
    assert failures == [["step-1"]] * times, "step 1 must be renamed already"
    assert ("Attempt 2 of 2" in caplog.text) == (times == 2)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert [check_whole(tmp_path / "checkpoint" / name).step for name in names(tmp_path)] == [1, 2]


@pytest.mark.parametrize("function", ["rename", "rmdir"])
def test_undeletable_old_checkpoints_do_not_end_the_run(tmp_path, monkeypatch, caplog, function):
    original = getattr(os, function)

    def fail(path=".", *args, **kwargs):
        if "step-1" in str(path) and "saving" not in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, *args, **kwargs)

    with closing(build(tmp_path, keep_latest_k=1)) as checkpointer:
        checkpointer.save(1, {"part": Part(1)})
        checkpointer.wait()
        monkeypatch.setattr(os, function, fail)
        checkpointer.save(2, {"part": Part(2)})
        checkpointer.wait()
        monkeypatch.undo()
        checkpointer.save(3, {"part": Part(3)}, last=True)
    assert "step-3" in names(tmp_path)
    assert "step-2" not in names(tmp_path)
    assert "Input/output error" in caplog.text
