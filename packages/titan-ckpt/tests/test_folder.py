"""A folder that holds more than this run's checkpoints: what was there, odd names, links, addresses and other runs."""

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import pytest
import torch
from titan_ckpt import Checkpointer, CheckpointError, TensorReader, check_whole, export_model, read_config
from titan_ckpt.__main__ import main
from titan_config import ConfigError


class Part:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value, "w": torch.ones(2)}

    def load_state_dict(self, state):
        self.value = state["value"]


def build(folder, **settings):
    return Checkpointer.Config(**{"interval": 1, "async_mode": "disabled", **settings}).build(dump_folder=folder)


def save_steps(folder, *steps, **settings):
    with closing(build(folder, **settings)) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"part": Part(step)})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


def load(folder, **settings):
    part = Part()
    with closing(build(folder, **settings)) as checkpointer:
        step = checkpointer.load({"part": part})
    assert step is None or part.value == step
    return step


def test_a_run_that_did_not_load_saves_nothing_below_the_newest_checkpoint(run_ranks, tmp_path):
    save_steps(tmp_path, 120, 130, keep_latest_k=2)

    def begin_anew():
        messages = []
        with closing(build(tmp_path, interval=10, keep_latest_k=2, async_mode="async")) as checkpointer:
            for step in (1, 10):  # at the first call, and at one that is due
                with pytest.raises(CheckpointError) as caught:
                    checkpointer.save(step, {"part": Part()})
                messages.append(str(caught.value))
            assert checkpointer.save(140, {"part": Part(140)}, last=True)
        return messages

    for messages in run_ranks(2, begin_anew):
        for step, message in zip((1, 10), messages, strict=True):
            assert f"must be at least 130, the newest checkpoint in {tmp_path / 'checkpoint'}, got {step}." in message
    assert names(tmp_path) == ["step-130", "step-140"]
    assert load(tmp_path) == 140


def test_what_was_just_saved_stays_whatever_else_appears_in_the_folder(tmp_path):
    save_steps(tmp_path / "other", 50, 60)
    with closing(build(tmp_path, keep_latest_k=1)) as checkpointer:
        checkpointer.save(10, {"part": Part(10)})
        for step in (50, 60):
            shutil.copytree(
                tmp_path / "other" / "checkpoint" / f"step-{step}", tmp_path / "checkpoint" / f"step-{step}"
            )
        checkpointer.save(20, {"part": Part(20)})
    assert names(tmp_path) == ["step-20", "step-50", "step-60"]


def test_load_step_acts_once(tmp_path, caplog):
    save_steps(tmp_path, 2, 4, 6, 8)
    for newest in (4, 5, 6):  # the command with load_step 4, started again twice
        with closing(build(tmp_path, load_step=4)) as checkpointer:
            assert checkpointer.load({"part": Part()}) == newest
            checkpointer.save(newest + 1, {"part": Part(newest + 1)})
    assert "A run with load_step 4 has gone back to that step" in caplog.text
    assert [name for name in names(tmp_path) if "aside" not in name] == [
        "step-2",
        "step-4",
        "step-5",
        "step-6",
        "step-7",
    ]
    assert load(tmp_path, load_step=5) == 5, "another one acts"
    save_steps_after_load(tmp_path, 6)
    assert load(tmp_path, load_step=4) == 4, "so does the first, after a run without it"
    assert Checkpointer.Config(load_step=2).read(tmp_path, {"part": Part()}) == 2


def save_steps_after_load(folder, step):
    with closing(build(folder)) as checkpointer:
        checkpointer.load({"part": Part()})
        checkpointer.save(step, {"part": Part(step)})


def test_load_step_goes_below_none_of_what_followed_it(tmp_path):
    save_steps(tmp_path, 2, 4)
    with closing(build(tmp_path, load_step=4)) as checkpointer:
        checkpointer.load({"part": Part()})
        checkpointer.save(6, {"part": Part(6)})
    for step in (4, 6):
        (tmp_path / "checkpoint" / f"step-{step}" / "tensors.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"2 checkpoints in .* all of them broken"):
        load(tmp_path, load_step=4)


def test_odd_names_are_left_alone_or_set_aside_and_stop_nothing(tmp_path):
    save_steps(tmp_path, 5, 7)
    folder = tmp_path / "checkpoint"
    shutil.copytree(folder / "step-5", folder / "step-007")
    shutil.copytree(folder / "step-5", folder / "step-٩")
    for name in ("step-8", "step-7x", "step-" + "9" * 200, "step-9.saving-ab", "step-9.deleting-cd"):
        (folder / name).write_text("mine")
    (folder / "step-10").symlink_to("nowhere")
    (folder / "step-11").symlink_to("step-11")
    (folder / "step-12.saving-ef").symlink_to(tmp_path)
    os.mkfifo(folder / "step-13")
    (folder / "step-6-hf").mkdir()
    (folder / "step-14-hf").mkdir()
    with closing(build(tmp_path, keep_latest_k=2)) as checkpointer:
        assert checkpointer.load({"part": Part()}) == 7
        assert checkpointer.skipped == []
        for step in range(8, 14):
            assert checkpointer.save(step, {"part": Part(step)})
    left = [name.partition(".set-aside-")[0] for name in names(tmp_path)]
    untouched = ["step-" + "9" * 200, "step-007", "step-7x", "step-٩", "step-6-hf"]
    aside = ["step-8", "step-10", "step-11", "step-13", "step-14-hf"]
    assert sorted(left) == sorted([*untouched, *aside, "step-12", "step-13"])
    assert load(tmp_path) == 13


def test_a_checkpoint_that_is_a_link_is_loaded_and_its_place_alone_is_freed(tmp_path):
    save_steps(tmp_path / "other", 5)
    save_steps(tmp_path, 1)
    (tmp_path / "checkpoint" / "step-5").symlink_to(tmp_path / "other" / "checkpoint" / "step-5")
    with closing(build(tmp_path, keep_latest_k=1)) as checkpointer:
        assert checkpointer.load({"part": Part()}) == 5
        checkpointer.save(6, {"part": Part(6)})
    assert names(tmp_path) == ["step-6"]
    assert load(tmp_path / "other") == 5


ADDRESSES = [
    "s3://bucket/run",
    "s3:/bucket",
    "S3://bucket",
    "file:///tmp/x",
    "gs://b",
    "hf://a/b",
    "simplecache::s3://b",
]


def test_an_address_is_refused_wherever_a_path_is_taken_and_nothing_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with closing(build(Path("run"))) as checkpointer:
        checkpointer.save(1, {"model": Part(1)})
    step = Path("run/checkpoint/step-1")
    for address in [*ADDRESSES, Path("s3://bucket")]:
        takers = [
            lambda path: Checkpointer.Config().build(dump_folder=path),
            lambda path: Checkpointer.Config().read(path, {"part": Part()}),
            check_whole,
            read_config,
            TensorReader,
            lambda path: export_model(step, path),
            lambda path: export_model(path, Path("out")),
        ]
        for take in takers:
            with pytest.raises(CheckpointError, match="must be a local path, got"):
                take(address)
        for settings in ({"folder": str(address)}, {"initial_load_path": Path(address)}):
            with pytest.raises(ConfigError, match=f"{next(iter(settings))}.* must be a local path"):
                Checkpointer.Config(**settings).build(dump_folder=Path("run"))
        for command in (["list"], ["verify"], ["export-hf", str(step)], ["export-model", str(step)]):
            assert main([*command, str(address)]) == 1
            assert "must be a local path" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
    for plain in ("a:b", "C:/run", "a/s3:/b", "7:/x"):
        build(tmp_path / plain).close()


@pytest.fixture
def fork():
    """Run `action` in another process up to its end, or to a pause; returns its id and whether it failed."""
    children = []

    def begin(action):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                action()
                os.write(writer, b"x")
                signal.pause()
            finally:
                os._exit(1)
        children.append(child)
        os.close(writer)
        with os.fdopen(reader, "rb") as told:
            return told.read(1) == b"x"

    yield begin
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def two_dump_folders(tmp_path):
    (tmp_path / "shared").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint").symlink_to(tmp_path / "shared")
    return tmp_path / "a", tmp_path / "b"


def test_two_dump_folders_with_one_folder_of_checkpoints_are_one_run(tmp_path, fork):
    first, second = two_dump_folders(tmp_path)
    live = tmp_path / "shared" / "step-1.saving-ab"

    def hold():
        build(first)
        live.mkdir()  # of a save under way

    assert fork(hold)
    with pytest.raises(CheckpointError, match="used by one process at a time, got another that saves"):
        build(second)
    assert live.is_dir()


def test_a_second_object_of_this_process_leaves_the_live_save_of_the_first_alone(tmp_path):
    first, second = two_dump_folders(tmp_path)
    with closing(build(first)) as checkpointer:
        temporary = checkpointer.checkpoint_folder.begin(1)
        build(second).close()
        assert temporary.is_dir()
        checkpointer.checkpoint_folder.end(temporary)


def test_a_save_is_not_published_once_another_process_has_the_folder(tmp_path, fork):
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"part": Part(1)})
        (tmp_path / "checkpoint" / ".lock").unlink()
        assert fork(lambda: build(tmp_path))
        with pytest.raises(CheckpointError, match="used by one process at a time, got another that saves"):
            checkpointer.save(2, {"part": Part(2)})
    assert names(tmp_path) == ["step-1"]


def test_a_lock_that_was_deleted_is_taken_again(tmp_path, fork):
    with closing(build(tmp_path)) as checkpointer:
        (tmp_path / "checkpoint" / ".lock").unlink()
        checkpointer.save(1, {"part": Part(1)})
        assert not fork(lambda: build(tmp_path))


def test_leftovers_stay_where_nothing_locks_them(tmp_path, monkeypatch, caplog):
    leftover = tmp_path / "checkpoint" / "step-1.saving-ab"
    leftover.mkdir(parents=True)
    monkeypatch.setattr("fcntl.lockf", lambda descriptor, operation: exec("raise OSError(37, 'No locks available')"))
    build(tmp_path).close()
    assert leftover.is_dir()
    assert "Nothing keeps a second run out" in caplog.text
    monkeypatch.undo()
    build(tmp_path).close()
    assert not leftover.exists()


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(build(Path("run"))) as checkpointer:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        checkpointer.save(1, {"part": Part(1)})
    assert names(tmp_path / "run") == ["step-1"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that root cannot write to")
def test_a_folder_that_cannot_be_written_to_is_an_error_on_all_before_the_first_step(run_ranks):
    def begin():
        with pytest.raises(CheckpointError, match=r"The folder of checkpoints must be writable") as caught:
            Checkpointer.Config(folder="self").build(dump_folder=Path("/proc"))
        return str(caught.value)

    assert all("on every rank, got [Errno" in message for message in run_ranks(2, begin))
