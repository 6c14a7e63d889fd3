"""Forked children: what is made up in them (ranks, meshes, caches of torch that hold them) ends with them."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

SLOW_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.flop_counter")

SECONDS_BETWEEN_LOOKS = 0.5


def in_child(function: Callable[[], Result]) -> Result:
    """What `function` returns in a child that belongs to no process group; what it raises is raised here.

    Closures work; the result must pickle. Nothing that the child changes is seen here.
    """
    return in_children([function])[0]


def in_children(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    """What `functions` return, as `in_child` has it: each in a child, as many at a time as there are processors."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)  # once here, and not in each child
    results: list[Result] = []
    running: list[tuple[int, IO[bytes]]] = []
    try:
        for function in functions:
            if len(running) == (os.cpu_count() or 1):
                results.append(_result(*running.pop(0)))
            running.append(_start(function))
        while running:
            results.append(_result(*running.pop(0)))
    finally:
        for child, pipe in running:  # one before them failed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pipe.close()
    return results


def _start(function: Callable[[], Any]) -> tuple[int, IO[bytes]]:
    """A child at work, and where its answer comes from."""
    reader, writer = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child uses none of them
        child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(function, writer, parent)
    os.close(writer)
    return child, os.fdopen(reader, "rb")


def _result(child: int, pipe: IO[bytes]) -> Any:
    with pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError(
            "Got no answer from the child that plans: it was ended. It needs about half a GiB. Free some memory."
        )
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    return value


def _answer(function: Callable[[], Any], writer: int, parent: int) -> None:
    """The whole life of the child."""
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork; without one none is needed
    warnings.simplefilter("ignore")
    try:
        _forget_groups()
        answer = pickle.dumps((True, function()))
    except BaseException as error:
        answer = _pickled(error)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)  # no exit handlers of the parent, whose groups this process holds


def _end_with(parent: int) -> None:
    """A parent that is killed ends no child, and nobody waits for the answer."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _pickled(error: BaseException) -> bytes:
    trace = f"{error}\n\nIn the child that planned:\n{traceback.format_exc()}"
    if not isinstance(error, ValueError):
        return pickle.dumps((False, RuntimeError(trace)))
    try:
        return pickle.dumps((False, error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return pickle.dumps((False, ValueError(str(error))))


_left_behind: list[Any] = []  # groups whose threads a forked child does not have: never to be destroyed in it


def _forget_groups() -> None:
    """Have no process group, without ending those of the parent."""
    world = dist.distributed_c10d._world
    _left_behind.extend([*world.pg_map, world.default_pg])
    world.default_pg = None
    for table in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_to_tag,
        world.tags_to_pg,
        world.pg_coalesce_state,
    ):
        table.clear()
    world.group_count = 0
    torch._C._distributed_c10d._unregister_all_process_groups()
