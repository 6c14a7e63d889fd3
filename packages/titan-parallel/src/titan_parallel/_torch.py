"""The private side of torch that this package uses, in one place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore as FileStore  # type: ignore[attr-defined]  # for ranks of one machine
from torch.distributed import HashStore as HashStore  # type: ignore[attr-defined]  # for a rank alone
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode


def flatten(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks along one axis, in the same order."""
    return mesh._flatten()


def concatenate(*meshes: DeviceMesh) -> DeviceMesh:
    """The axes of several meshes, slices of one, as one mesh."""
    return DeviceMesh._concatenate(list(meshes))


def default_group() -> dist.ProcessGroup:
    """The group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Collectives of `group` started from now on fail after `timeout`."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, without importing what makes them (half a second that one rank saves)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_no_memory(tensor: Tensor) -> bool:
    """Whether `tensor` is one of those that plans are made with: a shape, and nothing to read."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


# Functional collectives: their results are plain tensors, recomputation replays them, and the compiler traces them.


def all_reduce(tensor: Tensor, operation: str, group_name: str) -> Tensor:
    """The elementwise `operation` ("sum", "max") over the group, in a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(tensor.contiguous(), operation, group_name))


def all_gather(tensor: Tensor, group_size: int, group_name: str) -> Tensor:
    """The group's tensors (of one shape) one after another along dim 0."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(tensor.contiguous(), group_size, group_name))


def reduce_scatter(tensor: Tensor, group_size: int, group_name: str) -> Tensor:
    """This rank's chunk along dim 0 of the sum over the group."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.reduce_scatter_tensor(tensor.contiguous(), "sum", group_size, group_name))


def all_to_all(tensor: Tensor, group_name: str) -> Tensor:
    """Chunk r along dim 0 goes to rank r; what came, in order of rank. As many chunks as ranks in the group."""
    ops, equal = torch.ops._c10d_functional, [1] * len(tensor)
    return ops.wait_tensor(ops.all_to_all_single(tensor.contiguous(), equal, equal, group_name))


@contextmanager
def around_backward(mode: TorchFunctionMode) -> Iterator[None]:
    """Within, `mode` is on in backwards too, where recomputation runs: on its own it ends where the engine begins."""
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_mode  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]
