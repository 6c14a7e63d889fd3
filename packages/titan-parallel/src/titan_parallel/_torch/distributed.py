"""The private side of torch that this package uses, in one place."""

from __future__ import annotations

import os
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
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef  # compares by storage, and keeps no bytes
from torch.overrides import TorchFunctionMode


def flatten(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks along one axis, in the same order."""
    return mesh._flatten(backend_override=backend_of_axes(mesh.device_type))


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


class KeepsNoSubclass(Tensor):
    """A tensor with methods of its own, of which operations make plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def plain(self) -> Tensor:
        """The same numbers as a plain tensor."""
        return self.as_subclass(Tensor)


# Groups on CPU. ProcessGroupGloo has two workers, and each writes the name of the collective that it has completed to
# one std::string of the group, `lastCompletedWorkName`, after the caller is told, without a lock. A name of at most 15
# characters is stored in place. ALLGATHER_COALESCED, which is the functional all-gather (and with it what DTensor
# gathers), has 19: two workers at once free the same memory, and the process aborts at some later malloc. Seen with
# torch 2.11 and 2.13. With one worker there is nobody to race with.

_GLOO_IN_ORDER = "gloo_in_order"


def backend_of_axes(device_type: str) -> str | None:
    """The backend for groups of mesh axes: gloo with one worker in place of gloo on CPU. None: that of all ranks."""
    if device_type != "cpu" or "cpu:gloo" not in dist.get_backend_config().split(","):
        return None
    if _GLOO_IN_ORDER not in dist.Backend.backend_list:
        dist.Backend.register_backend(_GLOO_IN_ORDER, _gloo_in_order, devices=["cpu"])
    return _GLOO_IN_ORDER


def _gloo_in_order(store: Any, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """What torch makes for "gloo" (on the same network interfaces), with one worker and the timeout of all ranks."""
    gloo: Any = dist.ProcessGroupGloo
    interfaces = list(filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")))
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
    options._threads = 1
    options._timeout = min(timeout, default_group()._get_backend(torch.device("cpu")).options._timeout)
    return gloo(store, rank, size, options)


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
