"""Private torch APIs of distributed, tensors and autograd that this package uses."""

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
from torch.distributed import FileStore as FileStore  # type: ignore[attr-defined]  # for the ranks of one machine
from torch.distributed import HashStore as HashStore  # type: ignore[attr-defined]  # for a single rank
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef  # compares by storage; keeps no memory
from torch.overrides import TorchFunctionMode


def flatten(mesh: DeviceMesh) -> DeviceMesh:
    """Return a mesh of the same ranks, in the same order, with one axis."""
    return mesh._flatten(backend_override=backend_of_axes(mesh.device_type))


def concatenate(*meshes: DeviceMesh) -> DeviceMesh:
    """Return one mesh with the axes of several meshes, which must be slices of the same mesh."""
    return DeviceMesh._concatenate(list(meshes))


def default_group() -> dist.ProcessGroup:
    """Return the process group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set the timeout of the collectives that are started on `group` from now on."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether `tensor` is a `DTensor`, without importing `torch.distributed.tensor`.

    The import takes half a second, which a run on one rank saves.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_no_memory(tensor: Tensor) -> bool:
    """Return whether `tensor` is a `FakeTensor`, as in a dry run: it has a shape, but no values to read."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


class KeepsNoSubclass(Tensor):
    """A tensor subclass with additional methods; the results of operations on it are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def plain(self) -> Tensor:
        """Return a plain tensor that shares the values."""
        return self.as_subclass(Tensor)


# Groups on CPU. ProcessGroupGloo has two worker threads. After a worker has notified the caller of a completed
# collective, it writes the name of the collective to the std::string `lastCompletedWorkName`, which is one per group,
# without a lock. A name of at most 15 characters is stored inside the string object. ALLGATHER_COALESCED (the
# functional all-gather, and so every gather of a DTensor) has 19 characters: two workers that write at once free the
# same memory, and the process aborts at some later malloc. Seen with torch 2.11 and 2.13. With one worker there is no
# race.

_GLOO_IN_ORDER = "gloo_in_order"


def backend_of_axes(device_type: str) -> str | None:
    """Return the backend for groups of mesh axes: gloo with one worker on CPU; None for that of the default group."""
    if device_type != "cpu" or "cpu:gloo" not in dist.get_backend_config().split(","):
        return None
    if _GLOO_IN_ORDER not in dist.Backend.backend_list:
        dist.Backend.register_backend(_GLOO_IN_ORDER, _gloo_in_order, devices=["cpu"])
    return _GLOO_IN_ORDER


def _gloo_in_order(store: Any, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Return the group that torch creates for "gloo" (on the same network interfaces), but with one worker.

    The timeout is at most that of the group of all ranks.
    """
    gloo: Any = dist.ProcessGroupGloo
    interfaces = list(filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")))
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
    options._threads = 1
    options._timeout = min(timeout, default_group()._get_backend(torch.device("cpu")).options._timeout)
    return gloo(store, rank, size, options)


# Functional collectives: their results are plain tensors, activation checkpointing replays them, torch.compile traces
# them.


def all_reduce(tensor: Tensor, operation: str, group_name: str) -> Tensor:
    """Return the elementwise `operation` ("sum", "max") over the group, in a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(tensor.contiguous(), operation, group_name))


def all_gather(tensor: Tensor, group_size: int, group_name: str) -> Tensor:
    """Return the tensors of the group's ranks (all of one shape), concatenated along dim 0."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(tensor.contiguous(), group_size, group_name))


def reduce_scatter(tensor: Tensor, group_size: int, group_name: str) -> Tensor:
    """Return this rank's chunk, along dim 0, of the sum over the group."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.reduce_scatter_tensor(tensor.contiguous(), "sum", group_size, group_name))


def all_to_all(tensor: Tensor, group_name: str) -> Tensor:
    """Send index r of dim 0 to rank r, and return the received slices in order of rank. Dim 0 has the group's size."""
    ops, equal = torch.ops._c10d_functional, [1] * len(tensor)
    return ops.wait_tensor(ops.all_to_all_single(tensor.contiguous(), equal, equal, group_name))


@contextmanager
def around_backward(mode: TorchFunctionMode) -> Iterator[None]:
    """Keep `mode` active in backward passes too, for the forwards that activation checkpointing recomputes there.

    A function mode is suspended while it handles a call, and `Tensor.backward` is one.
    """
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_mode  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]
