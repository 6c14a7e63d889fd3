"""Two processes never save to the same folder, and a dead process does not block it."""

import fcntl
import os
import signal
from contextlib import suppress

import pytest
import torch
from titan_ckpt import Checkpointer, CheckpointError


class Weights:
    def state_dict(self):
        return {"w": torch.ones(3)}

    def load_state_dict(self, state):
        pass


def build(dump_folder, **settings):
    return Checkpointer.Config(interval=1, **settings).build(dump_folder=dump_folder)


@pytest.fixture
def fork(tmp_path):
    """Start another process that opens the folder, calls `then` and stays; return its id, or None if it failed."""
    children = []

    def begin(then=lambda checkpointer: None):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            try:
                then(build(tmp_path))
                os.write(writer, b"x")
                signal.pause()
            finally:
                os._exit(1)
        children.append(child)
        os.close(writer)
        began = os.read(reader, 1) == b"x"
        os.close(reader)
        return child if began else None

    yield begin
    for child in children:
        kill(child)


def kill(child):
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_process_is_rejected_until_the_first_is_killed(tmp_path, fork):
    other = fork(lambda checkpointer: checkpointer.save(1, {"part": Weights()}, last=True))
    assert other
    before, written = sorted((tmp_path / "checkpoint").rglob("*")), (tmp_path / "checkpoint").stat().st_mtime_ns
    with pytest.raises(
        CheckpointError, match=r"one process at a time, got another process.*fuser .*/checkpoint/\.lock"
    ):
        build(tmp_path)
    assert sorted((tmp_path / "checkpoint").rglob("*")) == before
    assert (tmp_path / "checkpoint").stat().st_mtime_ns == written, "no temporary file was created"
    kill(other)
    assert build(tmp_path).load({"part": Weights()}) == 1


def test_a_process_whose_standard_input_is_closed_saves(tmp_path):
    standard_input = os.dup(0)
    os.close(0)
    try:
        checkpointer = build(tmp_path)
        assert os.path.samestat(os.fstat(0), os.stat(tmp_path / "checkpoint" / ".lock")), "the lock is descriptor 0"
        assert checkpointer.save(1, {"part": Weights()}, last=True)
        checkpointer.close()
    finally:
        os.dup2(standard_input, 0)
        os.close(standard_input)


def test_another_folder_below_the_same_dump_folder_is_free(tmp_path, fork):
    assert fork()
    build(tmp_path, folder="mine").close()


def test_close_releases_the_lock_and_the_same_process_is_never_rejected(tmp_path, fork):
    first = build(tmp_path)
    build(tmp_path)
    assert not fork()
    first.close()
    assert fork()


def test_a_child_that_outlives_the_run_does_not_hold_the_lock(tmp_path, fork):
    def leave_a_child(checkpointer):
        child = os.fork()
        if not child:
            signal.pause()
        (tmp_path / "child").write_text(str(child))

    other = fork(leave_a_child)
    kill(other)
    try:
        build(tmp_path).close()
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, fork):
    def refuse(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    build(tmp_path).save(1, {"part": Weights()}, last=True)
    assert "against a second run" in caplog.text
    assert fork(), "without a lock the second process is not rejected"


@pytest.mark.parametrize("kind", ["a folder", "a dangling link", "a FIFO"])
def test_a_lock_file_that_cannot_be_locked_is_rejected(tmp_path, kind):
    lock = tmp_path / "checkpoint" / ".lock"
    lock.parent.mkdir()
    make = {"a folder": lock.mkdir, "a dangling link": lambda: lock.symlink_to("gone/x")}
    make.get(kind, lambda: os.mkfifo(lock))()
    with pytest.raises(CheckpointError, match=rf"\.lock must be a regular file, got {kind}"):
        build(tmp_path)
