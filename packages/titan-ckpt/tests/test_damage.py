"""A damaged checkpoint is detected and reported before any weight changes, and never loaded."""

import pytest
import titan_ckpt.format.manifest
import torch
from titan_ckpt import BrokenCheckpoint, Checkpointer, CheckpointError, check_whole


class Weights:
    def __init__(self, value):
        self.w = torch.full((4096,), float(value))

    def state_dict(self):
        return {"w": self.w, "seen": {"tokens": 5}}

    def load_state_dict(self, state):
        assert state["seen"] == {"tokens": 5}


FILES = ["rank-00000.safetensors", "tensors.json", "state.json", "config.json", "manifest.json"]


def flip(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def delete(path):
    path.unlink()


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints: step 1 holds ones, step 2 twos."""
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=tmp_path)
    for step in (1, 2):
        checkpointer.save(step, {"model": Weights(step)})
    checkpointer.close()
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("harm", [flip, truncate, delete])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_reported_and_the_checkpoint_skipped(checkpoints, caplog, harm, name):
    harm(checkpoints / "step-2" / name)
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=checkpoints.parent)
    model = Weights(0)
    assert checkpointer.load({"model": model}) == 1
    assert model.w.eq(1).all()
    (broken,) = checkpointer.skipped
    assert broken.folder.name == "step-2"
    assert name in broken.reason
    assert "step-2" in caplog.text
    assert name in caplog.text
    assert checkpointer.save(2, {"model": model}, last=True), "the name step-2 is free again"


@pytest.mark.parametrize("harm", [flip, truncate, delete])
def test_load_step_of_a_broken_checkpoint_is_an_error(checkpoints, harm):
    harm(checkpoints / "step-2" / FILES[0])
    model = Weights(0)
    checkpointer = Checkpointer.Config(load_step=2).build(dump_folder=checkpoints.parent)
    with pytest.raises(BrokenCheckpoint, match=FILES[0]):
        checkpointer.load({"model": model})
    assert model.w.eq(0).all()


def test_load_step_of_a_missing_checkpoint_lists_the_existing_steps(checkpoints):
    checkpointer = Checkpointer.Config(load_step=5).build(dump_folder=checkpoints.parent)
    with pytest.raises(BrokenCheckpoint, match=r"Choose one of \[1, 2\]"):
        checkpointer.load({"model": Weights(0)})


def test_a_run_does_not_start_over_when_all_checkpoints_are_broken(checkpoints):
    flip(checkpoints / "step-1" / FILES[0])
    delete(checkpoints / "step-2" / "manifest.json")
    checkpointer = Checkpointer.Config().build(dump_folder=checkpoints.parent)
    with pytest.raises(
        CheckpointError, match=r"must be valid, got 2, all broken:\n  step-2: it has no manifest.json\n  step-1: rank-0"
    ):
        checkpointer.load({"model": Weights(0)})


def test_a_change_of_any_byte_of_the_tensors_is_detected(checkpoints):
    path = checkpoints / "step-2" / FILES[0]
    whole = path.read_bytes()
    for place in [0, 7, 8, 20, len(whole) // 2, len(whole) - 1]:
        flip(path, place)
        with pytest.raises(BrokenCheckpoint, match="right size but changed content"):
            check_whole(checkpoints / "step-2")
        path.write_bytes(whole)
    assert check_whole(checkpoints / "step-2").step == 2


def test_a_flipped_byte_would_load_without_checksums(checkpoints, monkeypatch):
    flip(checkpoints / "step-2" / FILES[0], -3)
    monkeypatch.setattr("titan_ckpt.load.load.find_damage", lambda folder, manifest, names: [])
    model = Weights(0)
    assert Checkpointer.Config().build(dump_folder=checkpoints.parent).load({"model": model}) == 2
    assert not model.w.eq(2).all()


def test_a_manifest_of_another_format_is_not_loaded(checkpoints, monkeypatch):
    monkeypatch.setattr(titan_ckpt.format.manifest, "FORMAT", 2)
    with pytest.raises(BrokenCheckpoint, match="its format must be 2 for this version of titan-ckpt, got 1"):
        check_whole(checkpoints / "step-1")
