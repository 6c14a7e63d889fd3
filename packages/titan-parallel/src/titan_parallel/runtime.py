"""Joining the other ranks, seeds, determinism, and how long to wait for each other."""

from __future__ import annotations

import os
import random
from datetime import timedelta

import torch
import torch.distributed as dist

from titan_parallel import _torch
from titan_parallel.dims import ParallelDims


def init_distributed(device_type: str | None = None, timeout_s: float = 300) -> torch.device:
    """Join the ranks that torchrun started, or be the only one, and return this rank's device.

    `device_type`: None takes CUDA where there is one. `timeout_s` bounds the wait in every collective. Does nothing
    but return the device where `torch.distributed` is set up already.
    """
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
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=_torch.HashStore(), rank=0, world_size=1)
    return device


def set_determinism(seed: int, *, deterministic: bool = False, warn_only: bool = False) -> None:
    """Seed Python's and torch's generators, alike on every rank; `deterministic` also takes bitwise repeatable kernels.

    Where there is no such kernel PyTorch raises, or only warns with `warn_only`.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def set_collective_timeout(dims: ParallelDims, seconds: float) -> None:
    """From now on wait at most `seconds` in a collective. All ranks call it together, after the first (slow) step."""
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
