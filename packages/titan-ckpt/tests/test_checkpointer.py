"""Checkpoints restore parts exactly, are published under the name of their step, and reject what does not fit."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, UserDict, defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from titan_ckpt import Checkpointer, CheckpointError, TensorReader, check_whole, export_model, read_config
from titan_config import ConfigError
from torch import nn


class Values:
    """A part with any state."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def build(folder: Path, **settings) -> Checkpointer:
    return Checkpointer.Config(**{"interval": 1, **settings}).build(dump_folder=folder)


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_tensors_and_values_are_restored_bit_for_bit(tmp_path, async_mode):
    tensors = {str(dtype): torch.randn(5, 3).mul(9).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "strided": torch.randn(4, 6).t()}
    tensors |= {"float8": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    values = {
        "n": 3,
        "x": 0.1,
        "inf": math.inf,
        "none": None,
        "flag": True,
        "text": "é",
        "pair": (0.9, 0.95),
        "empty": {},
        "by number": {1: "a", (2, 3): [None]},
        "bytes": b"\x00\xff",
        "set": {1, "a"},
        "like a tag": {"__tuple__": [1]},
    }
    original = Values(inner={"weights": tensors, "values": values}, items=[1, [2, {"a": (3,)}]])
    checkpointer = build(tmp_path, async_mode=async_mode)
    assert checkpointer.save(7, {"part": original})
    checkpointer.wait()

    restored = Values(
        inner={"weights": {name: torch.zeros_like(t) for name, t in tensors.items()}, "values": {}}, items=[]
    )
    assert checkpointer.load({"part": restored}) == 7
    assert restored.state["items"] == original.state["items"]
    assert restored.state["inner"]["values"] == values
    for name, tensor in tensors.items():
        loaded = restored.state["inner"]["weights"][name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    class Training:
        def __init__(self):
            torch.manual_seed(1)
            self.model = nn.Linear(4, 4)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
            self.step()

        def step(self):
            self.model(torch.ones(2, 4)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        def state_dict(self):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            return {names[p]: dict(state) for p, state in self.optimizer.state.items()}

        def load_state_dict(self, state):
            for name, parameter in self.model.named_parameters():
                self.optimizer.state[parameter] = state[name]

    straight, stopped, resumed = Training(), Training(), Training()
    straight.step()
    straight.step()
    stopped.step()
    checkpointer = build(tmp_path)
    checkpointer.save(2, {"model": stopped.model, "optimizer": stopped})
    assert checkpointer.load({"model": resumed.model, "optimizer": resumed}) == 2
    resumed.step()
    assert torch.equal(resumed.model.weight, straight.model.weight)


def test_an_async_save_contains_the_weights_at_the_time_of_the_call(tmp_path):
    weights = Values(w=torch.zeros(1 << 20))
    checkpointer = build(tmp_path)
    for step in range(1, 4):
        weights.state["w"].fill_(step)
        checkpointer.save(step, {"part": weights})
        weights.state["w"].fill_(-1)
    checkpointer.close()
    for step in range(1, 4):
        restored = Values(w=torch.empty(1 << 20))
        build(tmp_path, load_step=step).load({"part": restored})
        assert restored.state["w"].eq(step).all()
        for later in range(step + 1, 4):  # loading a step sets the later ones aside
            (aside,) = (tmp_path / "checkpoint").glob(f"step-{later}.set-aside-*")
            aside.rename(tmp_path / "checkpoint" / f"step-{later}")


def test_saves_at_the_interval_and_at_the_last_step(tmp_path):
    checkpointer = build(tmp_path, interval=3)
    part = {"part": Values(step=0)}
    assert [checkpointer.save(step, part, last=step == 7) for step in range(1, 8)] == [False, False, True] * 2 + [True]
    assert saved_steps(tmp_path) == ["step-3", "step-6", "step-7"]


def test_a_step_is_saved_once_and_never_overwritten(tmp_path):
    checkpointer = build(tmp_path)
    assert checkpointer.save(1, {"part": Values(run="first")}, last=True)
    assert not checkpointer.save(1, {"part": Values(run="again")}, last=True)
    other = build(tmp_path, async_mode="disabled")
    with pytest.raises(CheckpointError, match=r"step to save must be new, got step 1, which exists at .*step-1"):
        other.save(1, {"part": Values(run="other")})
    restored = Values()
    checkpointer.load({"part": restored})
    assert restored.state == {"run": "first"}


def test_keeps_the_latest_k(tmp_path):
    for keep, expected in [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])]:
        folder = tmp_path / str(keep)
        checkpointer = build(folder, keep_latest_k=keep)
        for step in range(1, 6):
            checkpointer.save(step, {"part": Values(w=torch.ones(2))})
        checkpointer.close()
        assert saved_steps(folder) == [f"step-{step}" for step in expected]


def test_load_without_checkpoints_returns_none(tmp_path):
    assert build(tmp_path).load({"part": Values()}) is None


def test_going_back_sets_newer_checkpoints_aside(tmp_path):
    checkpointer = build(tmp_path)
    for step in (1, 2, 3):
        checkpointer.save(step, {"part": Values(step=step)})
    checkpointer.close()
    back = build(tmp_path, load_step=1)
    assert back.load({"part": Values(step=0)}) == 1
    back.save(2, {"part": Values(step="anew")}, last=True)
    names = [name.partition(".set-aside-")[0] for name in saved_steps(tmp_path)]
    assert names == ["step-1", "step-2", "step-2", "step-3"]
    restored = Values()
    assert build(tmp_path).load({"part": restored}) == 2
    assert restored.state == {"step": "anew"}


def test_a_checkpoint_contains_the_config_and_the_versions(tmp_path):
    config = Checkpointer.Config(interval=4)
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=tmp_path, config=config)
    checkpointer.save(1, {"part": Values(a=1)}, last=True)
    folder = tmp_path / "checkpoint" / "step-1"
    assert read_config(folder)["interval"] == 4
    manifest = check_whole(folder)
    assert (manifest.step, manifest.world_size) == (1, 1)
    assert manifest.versions["torch"] == torch.__version__
    assert "titan-ckpt" in manifest.versions


def test_a_checkpoint_contains_no_pickles(tmp_path):
    build(tmp_path).save(1, {"model": nn.Linear(2, 2), "part": Values(a=(1, 2))}, last=True)
    for path in (tmp_path / "checkpoint" / "step-1").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert set(load_file(path)) == {"model.weight@0,0", "model.bias@0"}


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"1 missing in the checkpoint: part\.b"),
        ({}, r"1 only in the checkpoint: part\.a"),
        ({"a": torch.zeros(3)}, r"part\.a \(saved \[2\], here \[3\]\)"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, r"part\.a \(saved F32, here BF16\)"),
    ],
)
def test_load_rejects_tensors_that_do_not_fit_and_changes_nothing(tmp_path, here, message):
    checkpointer = build(tmp_path)
    checkpointer.save(1, {"part": Values(a=torch.ones(2)), "other": Values(w=torch.ones(2))}, last=True)
    other = Values(w=torch.zeros(2))
    with pytest.raises(CheckpointError, match=message):
        checkpointer.load({"other": other, "part": Values(**here)})
    assert other.state["w"].eq(0).all()


def test_load_rejects_missing_and_unexpected_parts(tmp_path):
    checkpointer = build(tmp_path)
    checkpointer.save(1, {"part": Values(a=1)}, last=True)
    with pytest.raises(CheckpointError, match=r"missing \['more'\], unexpected \[\]"):
        checkpointer.load({"part": Values(), "more": Values()})
    with pytest.raises(CheckpointError, match=r"missing \['more'\], unexpected \['part'\]"):
        checkpointer.load({"more": Values()})


def test_a_part_that_rejects_its_values_does_so_before_any_weight_changes(tmp_path):
    class Picky(Values):
        def load_state_dict(self, state):
            raise ValueError("The tokenizer must be a.")

    checkpointer = build(tmp_path)
    checkpointer.save(1, {"model": Values(w=torch.ones(2)), "data": Values(tokenizer="a")}, last=True)
    model = Values(w=torch.zeros(2))
    with pytest.raises(ValueError, match="The tokenizer must be a"):
        checkpointer.load({"model": model, "data": Picky(tokenizer="b")})
    assert model.state["w"].eq(0).all()


class Text(str):
    """A subclass that would be restored as its base class."""


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": object()}, r"part\.a must be a tensor, number, .* got object\."),
        ({"a": [{"b": {2: iter(())}}]}, r"part\.a\[0\]\.b\[2\] must be .* got tuple_iterator"),
        ({"a": np.array([None])}, r"part\.a must be .* got numpy\.ndarray"),
        ({"a": frozenset({1})}, r"part\.a must be .* got frozenset\."),
        ({"a": {"b": [bytearray(b"x")]}}, r"part\.a\.b\[0\] must be .* got bytearray\."),
        ({"a": torch.Size([2])}, r"part\.a must be .* got torch\.Size\."),
        ({"a": time.gmtime(0)}, r"part\.a must be .* got time\.struct_time\."),
        ({"a": signal.SIGINT}, r"part\.a must be .* got signal\.Signals\."),
        ({"a": Text("x")}, r"part\.a must be .* got .*Text\."),
        ({"a": {Text("x"): 1}}, r"a key of part\.a must be .* got .*Text\."),
        ({"a": {Text("x"): torch.ones(1)}}, r"a key of part\.a must be .* got .*Text\."),
        ({"a": np.ma.array([1])}, r"part\.a must be .* got numpy\.ma\..*MaskedArray"),
        ({"a": UserDict(b=1)}, r"part\.a must be .* got collections\.UserDict\."),
        ({"a": [-(10**4300)]}, r"part\.a\[0\] must be an integer of at most 4300 digits, got one of 14285 bits"),
        ({"a": {10**4300: 1}}, r"a key of part\.a must be an integer of at most 4300 digits"),
        ({"a": torch.ones(2).to_sparse()}, r"part\.a must be a dense tensor, got the layout torch\.sparse_coo"),
        (
            {"a": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)},
            r"part\.a must be a dense tensor, got a nested tensor",
        ),
        ({1: 2}, "part 'part' must be a dictionary with string keys"),
        (
            {"a": torch.ones(1, dtype=torch.complex128)},
            r"dtype of part\.a must be supported by safetensors, got torch\.complex128",
        ),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "two tensors named 'part.a.b'"),
    ],
)
def test_unsupported_states_are_rejected(tmp_path, state, message):
    part = Values()
    part.state = state
    with pytest.raises(CheckpointError, match=message):
        build(tmp_path).save(1, {"part": part})


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": 0},
        {"keep_latest_k": 0},
        {"initial_load_in_hf": True},
        {"max_failed_saves": 0},
        {"load_step": -1},
    ],
)
def test_invalid_settings_are_rejected(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build(tmp_path, **wrong)


def test_a_run_without_checkpoints_loads_the_initial_model(tmp_path):
    build(tmp_path / "old").save(5, {"model": Values(w=torch.ones(2)), "rest": Values(n=1)}, last=True)
    new = build(tmp_path / "new", initial_load_path=tmp_path / "old" / "checkpoint" / "step-5")
    model, rest = Values(w=torch.zeros(2)), Values(n=2)
    assert new.load({"model": model, "rest": rest}) is None
    assert model.state["w"].eq(1).all()
    assert rest.state["n"] == 2
    model.state["w"].fill_(3)
    new.save(1, {"model": model, "rest": rest}, last=True)
    again = build(tmp_path / "new", initial_load_path=tmp_path / "old" / "checkpoint" / "step-5")
    assert again.load({"model": model, "rest": rest}) == 1
    assert model.state["w"].eq(3).all()


def test_an_initial_checkpoint_of_another_model_is_rejected(tmp_path):
    build(tmp_path / "old").save(5, {"model": Values(w=torch.ones(2))}, last=True)
    path = tmp_path / "old" / "checkpoint" / "step-5"
    with pytest.raises(CheckpointError, match=r"model\.w \(saved \[2\], here \[3\]\)"):
        build(tmp_path / "new", initial_load_path=path).load({"model": Values(w=torch.ones(3))})
    with pytest.raises(
        CheckpointError, match=r"initial_load_path must be a valid checkpoint.*: it has no manifest\.json"
    ):
        build(tmp_path / "new", initial_load_path=path.parent).load({"model": Values(w=torch.ones(2))})


def test_an_exported_model_initializes_another_run(tmp_path):
    parts = {"model": Values(w=torch.ones(2), step=7), "optimizer": Values(m=torch.ones(2))}
    build(tmp_path / "old").save(5, parts, last=True)
    path = export_model(tmp_path / "old" / "checkpoint" / "step-5", tmp_path / "shared")
    assert path == tmp_path / "shared" / "step-5"
    assert set(load_file(path / "rank-00000.safetensors")) == {"model.w@0"}
    model = Values(w=torch.zeros(2))
    build(tmp_path / "new", initial_load_path=path).load({"model": model, "optimizer": Values(m=torch.zeros(2))})
    assert model.state["w"].eq(1).all()
    assert model.state["step"] == 7
    build(tmp_path / "data").save(5, {"data": Values(n=1)}, last=True)
    with pytest.raises(CheckpointError, match=r"must have the part \"model\", got \['data', 'random'\]"):
        export_model(tmp_path / "data" / "checkpoint" / "step-5", tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities for threads")
def test_only_the_background_thread_lowers_its_priority(tmp_path, monkeypatch):
    priorities = []
    rename = os.rename

    def record(temporary, final):
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        rename(temporary, final)

    monkeypatch.setattr(os, "rename", record)
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    for mode in ("disabled", "async"):
        build(tmp_path / mode, async_mode=mode).save(1, {"part": Values(w=torch.ones(2))}, last=True)
    assert priorities == [here, min(here + 10, 19)]  # 19 is the lowest priority
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here


def test_importing_the_package_does_not_import_dtensor_and_dcp():
    heavy = "{'torch.distributed.tensor', 'torch.distributed.checkpoint'} & set(sys.modules)"
    code = f"import sys, torch; before = {heavy}; import titan_ckpt; assert {heavy} == before, {heavy} - before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_cannot_be_created_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "checkpoint").write_text("mine")
    with pytest.raises(CheckpointError, match=r"Cannot create the checkpoint folder .*/checkpoint: "):
        Checkpointer.Config().build(dump_folder=tmp_path)
    assert (tmp_path / "checkpoint").read_text() == "mine"


def test_read_changes_nothing_in_the_folder_of_a_running_run(tmp_path):
    """Some parts of the newest valid checkpoint, or of another one, are read while a run holds the lock."""
    config = Checkpointer.Config(interval=1, async_mode="disabled")
    part = Values(weight=torch.zeros(3), n=0)
    assert config.read(tmp_path, {"model": part}) is None
    with closing(config.build(dump_folder=tmp_path)) as running:
        for step in (1, 2, 3):
            running.save(step, {"model": Values(weight=torch.full((3,), float(step)), n=step), "data": Values(at=step)})
        (tmp_path / "checkpoint" / "step-3" / "manifest.json").write_text("{")
        before = sorted(path.name for path in (tmp_path / "checkpoint").rglob("*"))
        assert config.read(tmp_path, {"model": part}) == 2
        assert torch.equal(part.state["weight"], torch.full((3,), 2.0))
        assert part.state["n"] == 2
        assert Checkpointer.Config(load_step=1).read(tmp_path, {"model": part}) == 1
        assert part.state["n"] == 1
        with pytest.raises(CheckpointError, match=r"load_step must be the step of a valid checkpoint, got 3: "):
            Checkpointer.Config(load_step=3).read(tmp_path, {"model": part})
        with pytest.raises(CheckpointError, match="other"):
            config.read(tmp_path, {"other": part})
        assert sorted(path.name for path in (tmp_path / "checkpoint").rglob("*")) == before


@pytest.mark.parametrize(
    "step", [2.0, -1, True, 10**18, pytest.param(10**5000, id="long"), "2", None, np.bool_(True), torch.tensor(True)]
)
@pytest.mark.parametrize("last", [False, True])
def test_a_step_that_load_would_not_find_is_rejected(tmp_path, step, last):
    with closing(build(tmp_path, interval=500)) as checkpointer:
        with pytest.raises(
            CheckpointError, match=r"^step must be an integer from 0 to 999999999999999999, got .{1,80}"
        ):
            checkpointer.save(step, {"part": Values(w=torch.ones(2))}, last=last)
        assert saved_steps(tmp_path) == []


@pytest.mark.parametrize("step", [np.int64(2), np.uint8(2), torch.tensor(2), 2, 10**18 - 1, 0])
def test_an_integer_of_any_library_is_a_step(tmp_path, step):
    with closing(build(tmp_path)) as checkpointer:
        assert checkpointer.save(step, {"part": Values(w=torch.ones(2))})
        checkpointer.wait()
        assert checkpointer.load({"part": Values(w=torch.zeros(2))}) == int(step)


def test_types_are_restored_exactly_and_dict_subclasses_of_torch_as_dict(tmp_path):
    exact = {"zero axes": np.array(2.5), "number": np.float32(2.5), "text": np.str_("x"), "bytes": np.bytes_(b"x")}
    exact |= {"large": 10**4300 - 1, "key": {np.int64(1): (True, 1, 1.0)}}
    plain = {"a": OrderedDict(b=1), "c": Counter([3, 3]), "d": defaultdict(int, e={4: OrderedDict()})}
    fresh = Values()
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"part": Values(**exact, **plain)})
        checkpointer.load({"part": fresh})
    assert {key: repr(fresh.state[key]) for key in exact if key != "large"} == {
        key: repr(value) for key, value in exact.items() if key != "large"
    }
    assert fresh.state["large"] == exact["large"]
    assert {key: fresh.state[key] for key in plain} == {"a": {"b": 1}, "c": {3: 2}, "d": {"e": {4: {}}}}
    assert {type(fresh.state[key]) for key in plain} == {dict}


def test_a_missing_step_is_reported_as_missing(tmp_path):
    part = {"part": Values(w=torch.ones(2))}
    build(tmp_path).save(1, part, last=True)
    with pytest.raises(CheckpointError, match=r"got 99: .*/checkpoint/step-99 does not exist\. Choose one of \[1\]"):
        build(tmp_path, load_step=99).load(part)
    with pytest.raises(CheckpointError, match=r"/checkpoint/step-99 does not exist"):
        check_whole(tmp_path / "checkpoint" / "step-99")
    for use in (read_config, TensorReader):
        with pytest.raises(CheckpointError, match=r"/checkpoint/step-99 does not exist"):
            use(tmp_path / "checkpoint" / "step-99")
