"""A checkpoint folder with foreign content: existing files, unusual names, links, URLs and other runs."""

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


def test_a_run_that_did_not_load_cannot_save_below_the_newest_checkpoint(run_ranks, tmp_path):
    save_steps(tmp_path, 120, 130, keep_latest_k=2)

    def start_over():
        messages = []
        with closing(build(tmp_path, interval=10, keep_latest_k=2, async_mode="async")) as checkpointer:
            for step in (1, 10):  # at the first call, and at a due save
                with pytest.raises(CheckpointError) as caught:
                    checkpointer.save(step, {"part": Part()})
                messages.append(str(caught.value))
            assert checkpointer.save(140, {"part": Part(140)}, last=True)
        return messages

    for messages in run_ranks(2, start_over):
        for step, message in zip((1, 10), messages, strict=True):
            assert f"must be at least 130, the newest checkpoint in {tmp_path / 'checkpoint'}, got {step}." in message
    assert names(tmp_path) == ["step-130", "step-140"]
    assert load(tmp_path) == 140


def test_a_new_checkpoint_is_kept_although_newer_ones_appear(tmp_path):
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
    assert "A run with load_step 4 has already gone back" in caplog.text
    assert [name for name in names(tmp_path) if "aside" not in name] == [
        "step-2",
        "step-4",
        "step-5",
        "step-6",
        "step-7",
    ]
    assert load(tmp_path, load_step=5) == 5, "another load_step acts"
    save_steps_after_load(tmp_path, 6)
    assert load(tmp_path, load_step=4) == 4, "the first load_step acts again after a run without it"
    assert Checkpointer.Config(load_step=2).read(tmp_path, {"part": Part()}) == 2


def save_steps_after_load(folder, step):
    with closing(build(folder)) as checkpointer:
        checkpointer.load({"part": Part()})
        checkpointer.save(step, {"part": Part(step)})


def test_a_repeated_load_step_never_loads_an_earlier_checkpoint(tmp_path):
    save_steps(tmp_path, 2, 4)
    with closing(build(tmp_path, load_step=4)) as checkpointer:
        checkpointer.load({"part": Part()})
        checkpointer.save(6, {"part": Part(6)})
    for step in (4, 6):
        (tmp_path / "checkpoint" / f"step-{step}" / "tensors.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"At least one checkpoint in .* must be valid, got 2, all broken"):
        load(tmp_path, load_step=4)


def test_unusual_names_are_ignored_or_set_aside(tmp_path):
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


def test_a_linked_checkpoint_is_loaded_and_only_the_link_is_deleted(tmp_path):
    save_steps(tmp_path / "other", 5)
    save_steps(tmp_path, 1)
    (tmp_path / "checkpoint" / "step-5").symlink_to(tmp_path / "other" / "checkpoint" / "step-5")
    with closing(build(tmp_path, keep_latest_k=1)) as checkpointer:
        assert checkpointer.load({"part": Part()}) == 5
        checkpointer.save(6, {"part": Part(6)})
    assert names(tmp_path) == ["step-6"]
    assert load(tmp_path / "other") == 5


URLS = [
    "s3://bucket/run",
    "s3:/bucket",
    "S3://bucket",
    "file:///tmp/x",
    "gs://b",
    "hf://a/b",
    "simplecache::s3://b",
]


def test_urls_are_rejected_wherever_a_path_is_expected_and_nothing_is_created(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with closing(build(Path("run"))) as checkpointer:
        checkpointer.save(1, {"model": Part(1)})
    step = Path("run/checkpoint/step-1")
    for url in [*URLS, Path("s3://bucket")]:
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
                take(url)
        for settings in ({"folder": str(url)}, {"initial_load_path": Path(url)}):
            with pytest.raises(ConfigError, match=f"{next(iter(settings))}.* must be a local path"):
                Checkpointer.Config(**settings).build(dump_folder=Path("run"))
        for command in (["list"], ["verify"], ["export-hf", str(step)], ["export-model", str(step)]):
            assert main([*command, str(url)]) == 1
            assert "must be a local path" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
    for plain in ("a:b", "C:/run", "a/s3:/b", "7:/x"):
        build(tmp_path / plain).close()


@pytest.fixture
def fork():
    """Run `action` in another process, which then stays alive; return whether it succeeded."""
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
        with os.fdopen(reader, "rb") as result:
            return result.read(1) == b"x"

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


def test_two_dump_folders_with_one_checkpoint_folder_share_its_lock(tmp_path, fork):
    first, second = two_dump_folders(tmp_path)
    live = tmp_path / "shared" / "step-1.saving-ab"

    def hold():
        build(first)
        live.mkdir()  # a save in progress

    assert fork(hold)
    with pytest.raises(CheckpointError, match="used by one process at a time, got another process that saves"):
        build(second)
    assert live.is_dir()


def test_a_second_checkpointer_of_this_process_keeps_the_save_of_the_first(tmp_path):
    first, second = two_dump_folders(tmp_path)
    with closing(build(first)) as checkpointer:
        temporary = checkpointer.checkpoint_folder.begin_save(1)
        build(second).close()
        assert temporary.is_dir()
        checkpointer.checkpoint_folder.end_save(temporary)


def test_a_save_is_not_published_after_another_process_took_the_lock(tmp_path, fork):
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"part": Part(1)})
        (tmp_path / "checkpoint" / ".lock").unlink()
        assert fork(lambda: build(tmp_path))
        with pytest.raises(CheckpointError, match="used by one process at a time, got another process that saves"):
            checkpointer.save(2, {"part": Part(2)})
    assert names(tmp_path) == ["step-1"]


def test_a_deleted_lock_is_acquired_again(tmp_path, fork):
    with closing(build(tmp_path)) as checkpointer:
        (tmp_path / "checkpoint" / ".lock").unlink()
        checkpointer.save(1, {"part": Part(1)})
        assert not fork(lambda: build(tmp_path))


def test_leftovers_are_kept_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    leftover = tmp_path / "checkpoint" / "step-1.saving-ab"
    leftover.mkdir(parents=True)
    monkeypatch.setattr("fcntl.lockf", lambda descriptor, operation: exec("raise OSError(37, 'No locks available')"))
    build(tmp_path).close()
    assert leftover.is_dir()
    assert "against a second run" in caplog.text
    monkeypatch.undo()
    build(tmp_path).close()
    assert not leftover.exists()


def test_a_relative_folder_does_not_follow_a_change_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(build(Path("run"))) as checkpointer:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        checkpointer.save(1, {"part": Part(1)})
    assert names(tmp_path / "run") == ["step-1"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that root cannot write to")
def test_a_read_only_folder_is_an_error_on_all_ranks_before_the_first_step(run_ranks):
    def begin():
        with pytest.raises(CheckpointError, match=r"The checkpoint folder must be writable") as caught:
            Checkpointer.Config(folder="self").build(dump_folder=Path("/proc"))
        return str(caught.value)

    assert all("on every rank, got [Errno" in message for message in run_ranks(2, begin))
