"""`kill -9` at any point of a save leaves earlier checkpoints valid; the next run resumes from the newest."""

import os
import signal
from pathlib import Path

import pytest
import torch
from titan_ckpt import Checkpointer, check_whole


class Holder:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state.update(state)


# In this order: the flush of each file (tensors, index, values, config, manifest) and of the folder, the rename that
# publishes, the flush of the parent, and the rename and the removals of the oldest.
MOMENTS = [("fsync", n) for n in range(1, 7)] + [
    ("rename", 1),
    ("fsync", 7),
    ("rename", 2),
    ("unlink", 1),
    ("rmdir", 1),
]
PUBLISHED = {("fsync", 7), ("rename", 2), ("unlink", 1), ("rmdir", 1)}


def save_and_die(folder, function, call, async_mode):
    """Save steps 1 and 2 in a child process that kills itself at call `call` of `os.<function>` in save 3."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        part = Holder({"w": torch.zeros(300_000)})
        config = Checkpointer.Config(interval=1, keep_latest_k=2, async_mode=async_mode)
        checkpointer = config.build(dump_folder=folder)
        for step in (1, 2):
            part.state["w"].fill_(step)
            checkpointer.save(step, {"part": part})
        checkpointer.wait()
        original, calls = getattr(os, function), []

        def deadly(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, function, deadly)
        part.state["w"].fill_(3)
        checkpointer.save(3, {"part": part})
        checkpointer.wait()
    finally:
        os._exit(1)


@pytest.mark.parametrize("async_mode", ["async", "disabled"])
@pytest.mark.parametrize(("function", "call"), MOMENTS)
def test_the_newest_valid_checkpoint_is_loaded_after_a_kill(tmp_path, function, call, async_mode):
    assert os.WTERMSIG(save_and_die(tmp_path, function, call, async_mode)) == signal.SIGKILL
    expected = 3 if (function, call) in PUBLISHED else 2
    part = Holder({"w": torch.zeros(300_000)})
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=tmp_path)
    assert checkpointer.load({"part": part}) == expected
    assert checkpointer.skipped == []
    assert part.state["w"].eq(expected).all()
    for path in (tmp_path / "checkpoint").glob("step-*"):
        check_whole(path)


def test_this_test_detects_a_save_published_without_a_manifest(tmp_path, monkeypatch):
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=tmp_path)
    checkpointer.save(1, {"part": Holder({"w": torch.ones(3)})}, last=True)
    monkeypatch.setattr("titan_ckpt.save.save.write_manifest", lambda folder, manifest: None)
    checkpointer.save(2, {"part": Holder({"w": torch.ones(3)})}, last=True)
    again = Checkpointer.Config(interval=1).build(dump_folder=tmp_path)
    assert again.load({"part": Holder({"w": torch.ones(3)})}) == 1
    assert again.skipped[0].reason == "it has no manifest.json"
    assert Path(again.skipped[0].folder).name == "step-2"
