"""Process group initialization, imports, seeds, determinism and timeouts."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import pkgutil
import random
import re
import subprocess
import sys

import pytest
import titan_parallel
import torch
import torch.distributed as dist
from titan_parallel import ParallelDims, set_collective_timeout, set_determinism

ALONE = """
import os, torch, torch.distributed as dist
from titan_parallel import init_distributed
device = init_distributed("cpu", timeout_s=7)
assert device == torch.device("cpu") and dist.get_world_size() == 1 and dist.get_backend() == "gloo"
assert init_distributed("cpu") == device
one = torch.ones(1); dist.all_reduce(one); assert one == 1
print("alone")
"""


def test_a_process_without_a_launcher_is_the_only_rank():
    of_launchers = ("SLURM_", "OMPI_", "MV2_", "PMI_", "RANK", "WORLD_SIZE", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_launchers)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.stdout == "alone\n", done.stderr


def test_torchrun_ranks_join(tmp_path):
    script = tmp_path / "join.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from titan_parallel import init_distributed\n"
        "init_distributed('cpu')\n"
        "dist.barrier()\n"
        "open(f'rank {dist.get_rank()} of {dist.get_world_size()}', 'w')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank 0 of 2", "rank 1 of 2"], done.stderr


def test_import_loads_no_heavy_torch_modules():
    packages = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo.")
    heavy = f"{{name for name in sys.modules if name.startswith({packages})}}"
    code = f"import sys, torch; before = {heavy}; import titan_parallel; assert {heavy} == before, {heavy} - before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_and_titan_config_are_the_only_dependencies():
    needed = [line for line in importlib.metadata.requires("titan-parallel") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needed} == {"torch", "titan-config"}


def test_no_module_imports_an_optional_package():
    modules = [module.name for module in pkgutil.walk_packages(titan_parallel.__path__, "titan_parallel.")]
    others = ("transformers", "datasets", "safetensors", "lightning_fabric", "accelerate")
    code = f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "titan_parallel.parallelize" in modules
    assert not [name for name in others if f"'{name}'" in done.stdout]


def test_the_same_seed_gives_the_same_numbers():
    def numbers():
        return random.random(), torch.rand(3).tolist()

    set_determinism(seed=5)
    first = numbers()
    set_determinism(seed=5)
    assert numbers() == first
    set_determinism(seed=6)
    assert numbers() != first


def test_deterministic_selects_errors_or_warnings(on_one_rank):
    def modes():
        seen = []
        for deterministic, warn_only in ((False, False), (True, False), (True, True)):
            set_determinism(seed=0, deterministic=deterministic, warn_only=warn_only)
            seen.append(
                (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
            )
        return seen, os.environ["CUBLAS_WORKSPACE_CONFIG"]

    assert on_one_rank(modes) == ([(False, False), (True, False), (True, True)], ":4096:8")


def test_the_collective_timeout_ends_a_wait(run_ranks):
    """Without it the wait would be half an hour, longer than `run_ranks` allows."""
    has_given_up = multiprocessing.get_context("fork").Event()

    def waits():
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        set_collective_timeout(dims, 1.5)
        if dist.get_rank() == 1:
            has_given_up.wait()  # and never joins the all-reduce
            return
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.ones(1), group=dims.data_group)
        has_given_up.set()

    run_ranks(2, waits)
