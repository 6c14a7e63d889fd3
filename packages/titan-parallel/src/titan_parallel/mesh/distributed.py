"""Process group initialization, seeds, determinism and collective timeouts."""

from __future__ import annotations

import os
import random
from datetime import timedelta

import torch
import torch.distributed as dist

from titan_parallel._torch import distributed as _torch
from titan_parallel.mesh.launchers import adopt_launcher
from titan_parallel.mesh.parallel_dims import ParallelDims


def init_distributed(device_type: str | None = None, timeout_s: float = 300) -> torch.device:
    """Initialize torch.distributed and return this rank's device.

    Joins the ranks that torchrun, srun or mpirun started; without a launcher the process is the only rank.
    `device_type`: None selects CUDA if available, else the CPU. `timeout_s`, in seconds, limits the wait in every
    collective. If `torch.distributed` is initialized already, only sets and returns the device. Raises TimeoutError if
    not all ranks join in time.
    """
    if not dist.is_initialized():
        adopt_launcher()
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            _join(backend, timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=_torch.HashStore(), rank=0, world_size=1)
    return device


def _join(backend: str, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        rank, size, address, port = (os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise TimeoutError(
            f"All {size} ranks must join at {address}:{port} within {timeout.total_seconds():.0f} s, but rank {rank} "
            f"could not: {str(error).splitlines()[0]} Check the logs of the other ranks, and MASTER_ADDR and "
            "MASTER_PORT. To run a single process, set RANK=0 and WORLD_SIZE=1."
        ) from error


def set_determinism(seed: int, *, deterministic: bool = False, warn_only: bool = False) -> None:
    """Seed the random number generators of Python and torch, with the same seed on every rank.

    `deterministic` also selects deterministic kernels: results are repeatable bit for bit. For an operation without one
    PyTorch raises RuntimeError, or with `warn_only` warns. Raises ValueError for a seed outside 0 to 2**64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {repr(seed)[:40]}.")
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def set_collective_timeout(dims: ParallelDims, seconds: float) -> None:
    """Limit the wait in collectives from now on to `seconds`. All ranks must call it, after the first (slow) step."""
    dist.barrier()
    if dims.device_type == "cuda":
        torch.cuda.synchronize()
    for group in {
        _torch.default_group(),
        dims.data_group,
        *dims.mesh.get_all_groups(),
        *dims.fsdp_mesh.get_all_groups(),
    }:
        _torch.set_timeout(group, timedelta(seconds=seconds))
