"""Groups of mesh axes on CPU: gloo with one worker, since two can abort the process (see `_torch/distributed.py`)."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from titan_parallel import ParallelDims

API = "ProcessGroupGloo._Options must have _threads. See _gloo_in_order: is it still needed, and how is it set?"

OVERLAPPING_GATHERS = """
import sys
import torch
import torch.distributed as dist
from titan_parallel._torch.distributed import backend_of_axes

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.new_group(backend=backend_of_axes("cpu") if sys.argv[1] == "axis" else "gloo").group_name
ops, x = torch.ops._c10d_functional, torch.arange(8.0)
for _ in range(int(sys.argv[2])):
    for gathered in [ops.all_gather_into_tensor(x, 1, group) for _ in range(16)]:
        assert torch.equal(ops.wait_tensor(gathered), x)
print("done")
"""
"""With "plain" for "axis" this is the reproducer for torch: 2.11 and 2.13 abort within seconds on two idle cores."""


def options_of(group):
    """Return the options with which torch created the CPU backend of a group."""
    return group._get_backend(torch.device("cpu")).options


def test_every_axis_has_a_group_with_one_worker(run_ranks):
    def workers():
        dims = ParallelDims.Config(tensor_parallel_degree=2, data_parallel_replicate_degree=2).build(
            world_size=4, device_type="cpu"
        )
        whole = ParallelDims.Config(tensor_parallel_degree=4).build(world_size=4, device_type="cpu")
        flat = ParallelDims.Config(data_parallel_replicate_degree=2).build(world_size=4, device_type="cpu")
        of_tensors = [dims.tp_mesh.get_group(), whole.tp_mesh.get_group()]
        groups = [*of_tensors, *flat.fsdp_mesh.get_all_groups(), flat.data_group]
        return [options_of(group)._threads for group in groups], options_of(dist.group.WORLD)._threads

    assert hasattr(dist.ProcessGroupGloo._Options(), "_threads"), API
    for of_axes, of_all in run_ranks(4, workers):
        assert (of_axes, of_all) == ([1] * 5, 2)


def test_the_timeout_of_an_axis_is_at_most_that_of_all_ranks(run_ranks):
    def timeouts():
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=7))
        dims = ParallelDims.Config(tensor_parallel_degree=2).build(world_size=2, device_type="cpu")
        return options_of(dims.tp_mesh.get_group())._timeout

    assert run_ranks(2, timeouts) == [timedelta(seconds=7)] * 2


@pytest.mark.full
def test_overlapping_gathers_do_not_abort():
    done = subprocess.run([sys.executable, "-c", OVERLAPPING_GATHERS, "axis", "10000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
