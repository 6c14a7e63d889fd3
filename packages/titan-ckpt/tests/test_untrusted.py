"""The metadata of a checkpoint is verified: an invalid checkpoint is skipped with a one-line reason, never loaded."""

import json
import os
import random
import shutil
import socket
from contextlib import closing, suppress

import pytest
import torch
import torch.distributed as dist
import xxhash
from titan_ckpt import BrokenCheckpoint, Checkpointer, CheckpointError, check_whole
from titan_ckpt.__main__ import main

TENSORS = "rank-00000.safetensors"


class Part:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def parts(value):
    return {
        "model": Part(w=torch.full((6, 4), float(value)), b=torch.full((3,), float(value))),
        "trainer": Part(step=value),
        "other": Part(step="any"),
    }


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints: step 1 holds ones, step 2 twos."""
    with closing(Checkpointer.Config(interval=1, async_mode="disabled").build(dump_folder=tmp_path)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, parts(step))
    return tmp_path / "checkpoint"


def seal(folder, change=lambda content: None):
    """Update the manifest to match the files, and its own checksum."""
    stored = json.loads((folder / "manifest.json").read_text())
    content = stored["content"]
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"size": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    change(content)
    stored["xxh3"] = xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(stored))


def edit(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    seal(folder)


def load(folder):
    """Return the loaded step, the weights, and the reasons of skipped checkpoints; release the lock."""
    with closing(Checkpointer.Config(interval=1).build(dump_folder=folder.parent)) as checkpointer:
        target = parts(0)
        step = checkpointer.load(target)
        return step, target["model"].state["w"].unique().tolist(), [over.reason for over in checkpointer.skipped]


W, B = "model.w", "model.b"
INDEX_EDITS = {
    "no chunks": (lambda index: index[W].update(chunks=[]), "no chunks"),
    "a gap": (lambda index: index[W]["chunks"][0].update(sizes=[5, 4]), "a gap or an overlap"),
    "twice": (lambda index: index[W].update(chunks=index[W]["chunks"] * 2), "a gap or an overlap"),
    "minus one": (lambda index: index[W]["chunks"][0].update(sizes=[-1, 4]), r"from 0 to 2\^63 - 1, got -1"),
    "beyond the end": (lambda index: index[W]["chunks"][0].update(offsets=[1, 0]), r"a chunk of \[6, 4\] at \[1, 0\]"),
    "another shape": (
        lambda index: (index[W].update(shape=[4, 6]), index[W]["chunks"][0].update(sizes=[4, 6])),
        r"differ in model\.w@0,0",
    ),
    "another type": (lambda index: index[W].update(dtype="I32"), r"differ in model\.w@0,0"),
    "an unknown type": (lambda index: index[W].update(dtype="X9"), "unknown dtype 'X9'"),
    "no tensor": (lambda index: index.pop(B), r"differ in model\.b@0"),
    "a file not listed": (
        lambda index: index[W]["chunks"][0].update(file="other.safetensors"),
        "other.safetensors is in tensors.json but not in the manifest",
    ),
    "a file in another folder": (
        lambda index: index[W]["chunks"][0].update(file="../step-1/" + TENSORS),
        "plain file name",
    ),
    "text": (lambda index: index.update({W: "text"}), r"model\.w must be an object, got 'text'"),
    "a flag": (lambda index: index[B].update(shape=[True]), "must be an integer.*got True"),
    "64 dims": (
        lambda index: index[W].update(
            shape=[2] * 64, chunks=[{"offsets": [0] * 64, "sizes": [1] * 64, "file": TENSORS}]
        ),
        "split along 64 dims",
    ),
}


@pytest.mark.parametrize("name", INDEX_EDITS)
def test_an_inconsistent_index_is_skipped(checkpoints, name):
    change, reason = INDEX_EDITS[name]
    edit(checkpoints / "step-2", "tensors.json", change)
    with pytest.raises(BrokenCheckpoint, match=reason) as caught:
        check_whole(checkpoints / "step-2")
    step, weights, (over,) = load(checkpoints)
    assert (step, weights, over) == (1, [1.0], str(caught.value))
    assert "\n" not in over


VALUES_EDITS = {
    "NaN": (lambda values: values["trainer"].update(step=float("nan")), "trainer must be at step 2, got step nan"),
    "negative": (lambda values: values["trainer"].update(step=-3), "trainer must be at step 2, got step -3"),
    "a flag": (lambda values: values["trainer"].update(step=True), "trainer must be at step 2, got step True"),
    "none": (lambda values: values["trainer"].clear(), "trainer must be at step 2, got step None"),
    "no part": (lambda values: values.pop("trainer"), "trainer must be at step 2, got step None"),
    "a list": (lambda values: values.update(trainer=[2]), r"'trainer' must be an object, got \[2\]"),
    "no array": (lambda values: values.update(other={"a": {"__array__": 1}}), "state.json cannot be read"),
}


@pytest.mark.parametrize("name", VALUES_EDITS)
def test_values_that_contradict_the_step_are_skipped(checkpoints, name):
    change, reason = VALUES_EDITS[name]
    edit(checkpoints / "step-2", "state.json", change)
    with pytest.raises(BrokenCheckpoint, match=reason):
        check_whole(checkpoints / "step-2")
    assert load(checkpoints)[:2] == (1, [1.0])


def test_values_with_a_duplicate_key_are_skipped(checkpoints):
    path = checkpoints / "step-2" / "state.json"
    path.write_text(path.read_text().replace('"trainer":', '"trainer": {"step": 7}, "trainer":'))
    seal(path.parent)
    with pytest.raises(BrokenCheckpoint, match=r"state\.json cannot be read: the key 'trainer' is duplicated"):
        check_whole(path.parent)
    assert load(checkpoints)[:2] == (1, [1.0])


def test_a_number_in_the_manifest_that_overflows_is_reported(checkpoints):
    path = checkpoints / "step-2" / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 1e999'))
    with pytest.raises(BrokenCheckpoint, match=r"manifest\.json cannot be read: the number 1e999 is not finite"):
        check_whole(path.parent)


MANIFEST_EDITS = {
    "step NaN": (lambda content: content.update(step=float("nan")), "the number NaN is not finite"),
    "step -3": (lambda content: content.update(step=-3), "step must be an integer from 0"),
    "another step": (lambda content: content.update(step=7), "is of step 7"),
    "no ranks": (lambda content: content.update(world_size=0), "world_size must be an integer from 1"),
    "a size of -1": (lambda content: content["files"][TENSORS].update(size=-1), "must be an integer from 0"),
    "no checksum": (lambda content: content["files"][TENSORS].pop("xxh3"), "must have the keys"),
    "no step": (lambda content: content.pop("step"), "must have the keys"),
    "files in a list": (lambda content: content.update(files=[]), r"files must be an object, got \[\]"),
    "no record of the values": (lambda content: content["files"].pop("state.json"), "does not list state.json"),
    "no record of the tensors": (
        lambda content: content["files"].pop(TENSORS),
        f"{TENSORS} is in tensors.json but not in the manifest",
    ),
    "a file above": (lambda content: content["files"].update({"../x": {}}), "must be a plain file name, got '../x'"),
    "a file at the root": (lambda content: content["files"].update({"/etc/x": {}}), "must be a plain file name"),
    "format 0": (lambda content: content.update(format=0), "format must be an integer from 1"),
}


@pytest.mark.parametrize("name", MANIFEST_EDITS)
def test_an_invalid_manifest_is_skipped(checkpoints, name):
    change, reason = MANIFEST_EDITS[name]
    seal(checkpoints / "step-2", change)
    with pytest.raises(BrokenCheckpoint, match=reason):
        check_whole(checkpoints / "step-2")
    assert load(checkpoints)[:2] == (1, [1.0])


def test_a_checkpoint_under_the_name_of_another_step_is_skipped(checkpoints, capsys):
    shutil.copytree(checkpoints / "step-1", checkpoints / "step-9")
    assert main(["list", str(checkpoints)]) == 0
    assert "step-9  broken: manifest.json is of step 1, not of the step in the folder name" in capsys.readouterr().out
    assert load(checkpoints) == (2, [2.0], ["manifest.json is of step 1, not of the step in the folder name"])


@pytest.mark.parametrize("with_new_layout", [False, True])
def test_a_newer_format_stops_the_run_and_nothing_is_renamed(checkpoints, with_new_layout):
    if with_new_layout:
        (checkpoints / "step-2" / "manifest.json").write_text('{"format": 2}')
    else:
        seal(checkpoints / "step-2", lambda content: content.update(format=2, more={}))
    before = sorted(path.name for path in checkpoints.iterdir())
    with pytest.raises(CheckpointError, match=r"step-2 cannot be read: its format must be 1 .*, got 2\. Update"):
        load(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_a_newer_format_stops_a_run_with_load_step_too(checkpoints):
    """The run may have gone back already, and its later checkpoints must not be set aside."""
    seal(checkpoints / "step-2", lambda content: content.update(format=2, load_step=1))
    before = sorted(path.name for path in checkpoints.iterdir())
    checkpointer = Checkpointer.Config(load_step=1).build(dump_folder=checkpoints.parent)
    message = r"step-2 cannot be read: its format must be 1 .*, got 2\. Update"
    with closing(checkpointer), pytest.raises(CheckpointError, match=message):
        checkpointer.load(parts(0))
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def to_folder(path):
    path.unlink()
    path.mkdir()


def to_fifo(path):
    path.unlink()
    os.mkfifo(path)


def to_socket(path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def to_link(target):
    def replace(path):
        path.unlink()
        path.symlink_to(target)

    return replace


def to_text(text):
    return lambda path: path.write_bytes(text)


ODD = {
    "a folder": to_folder,
    "a fifo": to_fifo,
    "a socket": to_socket,
    "an endless file": to_link("/dev/zero"),
    "a dangling link": to_link("nowhere"),
    "a link to itself": to_link("manifest.json"),
    "a link out of the folder": to_link(".."),
    "nothing": lambda path: path.unlink(),
    "empty": to_text(b""),
    "a list": to_text(b"[]"),
    "a number": to_text(b"3"),
    "deep": to_text(b"[" * 100_000),
    "deep objects": to_text(b'{"content":' * 100_000),
    "many digits": to_text(b'{"content": ' + b"1" * 5000 + b"}"),
    "a duplicate key": to_text(b'{"xxh3": "", "xxh3": "", "content": {}}'),
    "not text": to_text(b"\xff\xfe\x00\xd8" * 9),
    "a lone surrogate": to_text(b'{"xxh3": "", "content": {"\\ud800": 1}}'),
    "huge": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("file", ["manifest.json", "state.json", TENSORS])
def test_invalid_files_are_skipped_with_one_line_on_every_rank(run_ranks, tmp_path, file):
    def load_all():
        return [(name, *load(tmp_path / name / "checkpoint")) for name in ODD]

    for name in ODD:
        checkpointer = Checkpointer.Config(interval=1, async_mode="disabled").build(dump_folder=tmp_path / name)
        for step in (1, 2):
            checkpointer.save(step, parts(step))
        checkpointer.close()
        ODD[name](tmp_path / name / "checkpoint" / "step-2" / file)
    for results in run_ranks(2, load_all):
        for name, step, weights, reasons in results:
            assert (step, weights, len(reasons)) == (1, [1.0], 1), name
            assert file in reasons[0], name
            assert "\n" not in reasons[0], name


def mutate(folder, choose):
    """Change one thing in a checkpoint, with or without updating the checksums."""
    path = folder / choose.choice(["manifest.json", "tensors.json", "state.json", "config.json", TENSORS])
    kind = choose.randrange(4)
    if kind == 0:
        choose.choice(list(ODD.values()))(path)
    elif kind == 1:
        data = bytearray(path.read_bytes())
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(data)
    else:
        if path.suffix == ".json":
            data = json.loads(path.read_text())
            data = change_somewhere(data, choose)
            path.write_text(json.dumps(data))
        if path.name != "manifest.json" or (isinstance(data, dict) and isinstance(data.get("content"), dict)):
            with suppress(KeyError, TypeError, OSError, AttributeError):  # the manifest may have no valid files
                seal(folder)


def change_somewhere(data, choose):
    """Return `data` with one value replaced or removed, at any depth."""
    strange = [None, -1, 2**70, float("nan"), "", "../x", [], {}, True, [[]], "\0", 0.5]
    if not isinstance(data, dict | list) or not data or choose.random() < 0.2:
        return choose.choice(strange)
    key = choose.choice(list(data) if isinstance(data, dict) else range(len(data)))
    if choose.random() < 0.2:
        data.pop(key)
    else:
        data[key] = change_somewhere(data[key], choose)
    return data


def load_mutated(run_ranks, tmp_path, seeds, world_size):
    """Load checkpoints whose newest one is mutated; return the result of each seed on each rank."""
    checkpointer = Checkpointer.Config(interval=1, async_mode="disabled").build(dump_folder=tmp_path / "whole")
    for step in (1, 2):
        checkpointer.save(step, parts(step))
    checkpointer.close()
    for seed in seeds:
        shutil.copytree(tmp_path / "whole", tmp_path / str(seed))
        mutate(tmp_path / str(seed) / "checkpoint" / "step-2", random.Random(seed))

    def load_all():
        results = []
        for seed in seeds:
            target = parts(0)
            try:
                with closing(Checkpointer.Config(interval=1).build(dump_folder=tmp_path / str(seed))) as checkpointer:
                    step = checkpointer.load(target)
                    reasons = [over.reason for over in checkpointer.skipped]
            except CheckpointError as error:  # any other is a failure of the test
                results.append((type(error).__name__, str(error)))
            else:
                weights = [target["model"].state[name].unique().tolist() for name in ("w", "b")]
                results.append((step, weights, target["trainer"].state, target["other"].state, reasons))
            if dist.is_initialized():
                dist.barrier()
        return results

    return run_ranks(world_size, load_all)


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [
        (2, range(24)),
        pytest.param(1, range(24, 130), marks=pytest.mark.full),
        pytest.param(2, range(130, 230), marks=pytest.mark.full),
    ],
)
def test_mutated_folders_are_loaded_exactly_or_skipped_or_rejected(run_ranks, tmp_path, world_size, seeds):
    skipped = 0
    for results in load_mutated(run_ranks, tmp_path, seeds, world_size):
        for seed, result in zip(seeds, results, strict=True):
            if len(result) == 2:
                assert "Connection" not in result[1], (seed, result)
                continue
            step, weights, trainer, other, reasons = result
            assert weights == [[float(step)]] * 2, (seed, result)
            assert trainer == {"step": step}, (seed, result)
            values = json.loads((tmp_path / str(seed) / "checkpoint" / f"step-{step}" / "state.json").read_text())
            assert repr(other) == repr(values["other"]), (seed, result)  # which may be another, with its checksum
            assert len(reasons) == 2 - step, (seed, result)
            skipped += len(reasons)
    assert skipped > len(seeds) * world_size // 2


def test_these_edits_would_load_without_the_content_checks(checkpoints, monkeypatch):
    edit(checkpoints / "step-2", "state.json", VALUES_EDITS["NaN"][0])
    monkeypatch.setattr("titan_ckpt.load.load.find_inconsistencies", lambda folder, manifest: [])
    assert load(checkpoints)[0] == 2


def test_an_invalid_generator_state_is_rejected_before_any_weight_changes(checkpoints):
    edit(checkpoints / "step-2", "state.json", lambda values: values["random"]["ranks"]["0"].update(cpu="AAAA"))
    target = parts(0)
    message = 'part "random" must contain valid states of random number generators'
    checkpointer = Checkpointer.Config().build(dump_folder=checkpoints.parent)
    with closing(checkpointer), pytest.raises(CheckpointError, match=message):
        checkpointer.load(target)
    assert target["model"].state["w"].eq(0).all()


def test_non_finite_weights_are_reported(tmp_path, caplog):
    model = Part(a=torch.ones(3), b=torch.tensor([1.0, float("nan")]), c=torch.tensor([float("-inf")] * 2))
    with closing(Checkpointer.Config().build(dump_folder=tmp_path)) as checkpointer:
        checkpointer.save(1, {"model": model, "other": Part(nan=torch.tensor(float("nan")))}, last=True)
        checkpointer.load({"model": model, "other": Part(nan=torch.tensor(0.0))})
    assert "NaN or infinite values in 2 tensors: model.b, model.c." in caplog.text
