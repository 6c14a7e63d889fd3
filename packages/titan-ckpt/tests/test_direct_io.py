"""A file written with O_DIRECT equals an ordinarily written one, on every file system."""

import errno
import fcntl
import mmap
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from titan_ckpt import Checkpointer, CheckpointError, check_whole
from titan_ckpt.save import direct_io
from titan_ckpt.save.direct_io import allocate_pages, write_pages

SIZES = [0, 1, 511, 512, 4095, 4096, 4097, 3 * mmap.PAGESIZE + 5]
FILE = "checkpoint/step-1/rank-00000.safetensors"


class Values:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def save(folder, step, tensors, checkpointer=None, **settings):
    checkpointer = checkpointer or Checkpointer.Config(interval=1, **settings).build(dump_folder=folder)
    checkpointer.save(step, {"part": Values(**tensors)})
    checkpointer.wait()
    return checkpointer


def pages_of(size):
    pages = allocate_pages(size)
    pages.copy_(torch.randint(0, 256, pages.shape, dtype=torch.uint8))
    return pages.numpy().data


def refuse_the_flag(monkeypatch):
    """Behave like tmpfs before Linux 6.6."""
    original = fcntl.fcntl

    def refuse(descriptor, command, *arguments):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(descriptor, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refuse_the_write(monkeypatch):
    """Behave like a disk whose blocks are larger than a page."""
    original = os.pwrite

    def refuse(descriptor, data, place):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io._O_DIRECT and place:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(descriptor, data[: mmap.PAGESIZE], place)

    monkeypatch.setattr(os, "pwrite", refuse)


def have_no_flag(monkeypatch):
    """Behave like macOS."""
    monkeypatch.setattr(direct_io, "_O_DIRECT", 0)


@pytest.mark.parametrize("refusal", [None, refuse_the_flag, refuse_the_write, have_no_flag])
def test_files_of_any_size_are_written_exactly(tmp_path, monkeypatch, refusal):
    if refusal:
        refusal(monkeypatch)
    for size in SIZES:
        pages = pages_of(size)
        write_pages(tmp_path / str(size), pages, size)
        assert (tmp_path / str(size)).read_bytes() == bytes(pages[:size]), size


def test_misaligned_memory_is_written_too(tmp_path):
    misaligned = pages_of(5 * mmap.PAGESIZE)[3:]
    write_pages(tmp_path / "file", misaligned, 9999)
    assert (tmp_path / "file").read_bytes() == bytes(misaligned[:9999])


def test_the_page_cache_is_bypassed_if_the_file_system_supports_it(tmp_path, monkeypatch):
    descriptor = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
        os.pwrite(descriptor, pages_of(1), 0)
    except (OSError, AttributeError):
        pytest.skip("no O_DIRECT on this file system or operating system")
    finally:
        os.close(descriptor)
    direct, original = [], os.pwrite

    def record(descriptor, data, place):
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return original(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", record)
    save(tmp_path, 1, {"w": torch.ones(100_001)})
    assert direct == [True]


def test_a_file_is_never_overwritten(tmp_path):
    write_pages(tmp_path / "file", pages_of(5), 5)
    with pytest.raises(FileExistsError):
        write_pages(tmp_path / "file", pages_of(6), 6)
    assert (tmp_path / "file").stat().st_size == 5


def test_an_async_save_writes_the_bytes_of_a_synchronous_one(tmp_path):
    bases = [torch.float32, torch.bool, torch.float64, torch.uint8, torch.bfloat16, torch.complex64, torch.int64]
    tensors = {f"{n}.{dtype}": torch.randn(n).mul(5).to(dtype) for n in SIZES[:-1] for dtype in bases}
    tensors |= {"scalar": torch.tensor(2.5), "strided": torch.randn(40, 61).t(), "row": torch.randn(9, 8)[3]}
    for mode in ("async", "disabled"):
        save(tmp_path / mode, 1, tensors, async_mode=mode)
    assert (tmp_path / "async" / FILE).read_bytes() == (tmp_path / "disabled" / FILE).read_bytes()
    loaded = load_file(tmp_path / "async" / FILE)
    assert len(loaded) == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[f"part.{name}@{','.join('0' * tensor.dim())}"], tensor), name
    check_whole((tmp_path / "async" / FILE).parent)


def test_the_staging_buffer_follows_changes_of_names_shapes_and_dtypes(tmp_path):
    states = [
        {"a": torch.ones(5), "b": torch.ones(3)},
        {"a": torch.ones(5), "b": torch.zeros(3)},
        {"a": torch.ones(50), "b": torch.ones(3)},
        {"a": torch.ones(50), "b": torch.ones(3, dtype=torch.float64)},
        {"c": torch.ones(1)},
        {},
        {"b": torch.ones(3), "a": torch.ones(5)},
    ]
    checkpointer = None
    for step, state in enumerate(states, start=1):
        checkpointer = save(tmp_path, step, state, checkpointer)
        path = tmp_path / FILE.replace("step-1", f"step-{step}")
        loaded = load_file(path) if state else {}
        assert {name: loaded[f"part.{name}@0"].tolist() for name in state} == {k: t.tolist() for k, t in state.items()}
        assert len(loaded) == len(state)
        check_whole(path.parent)


def test_these_tests_detect_a_file_that_is_not_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, size: None)
    save(tmp_path, 1, {"w": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"must have \d+ bytes, got 4096"):
        check_whole((tmp_path / FILE).parent)


@contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("mode", ["async", "disabled"])
@pytest.mark.parametrize("limit", [1 << 20, (1 << 20) + 100])
def test_a_partial_write_is_an_error_and_earlier_checkpoints_stay(tmp_path, mode, limit):
    checkpointer = save(tmp_path, 1, {"w": torch.ones(4)}, async_mode=mode)
    with largest_file(limit), pytest.raises(CheckpointError, match=r"Saving step 2 to .* failed: .*File too large"):
        save(tmp_path, 2, {"w": torch.ones(1 << 20)}, checkpointer)
    assert check_whole(tmp_path / "checkpoint" / "step-1").step == 1
    assert not (tmp_path / "checkpoint" / "step-2").exists()
    save(tmp_path, 2, {"w": torch.ones(1 << 20)}, checkpointer)
    assert check_whole(tmp_path / "checkpoint" / "step-2").step == 2
