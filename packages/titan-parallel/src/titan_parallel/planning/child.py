"""Run functions in forked child processes: fake ranks, meshes and torch's caches of them end with the child."""

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

from titan_parallel._torch.fork import forget_process_groups

Result = TypeVar("Result")

SLOW_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.flop_counter")

POLL_INTERVAL_S = 0.5
"""Time between two checks whether the parent is alive."""


def run_in_child(function: Callable[[], Result]) -> Result:
    """Return the result of `function`, run in a forked child that belongs to no process group.

    Closures work; the result must pickle. Changes that the child makes are not visible here. An error in the child is
    raised here.
    """
    return run_in_children([function])[0]


def run_in_children(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    """Return the results of `functions`, each as in `run_in_child`, with as many children at a time as CPU cores."""
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
        for child, pipe in running:  # an earlier one failed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pipe.close()
    return results


def _start(function: Callable[[], Any]) -> tuple[int, IO[bytes]]:
    """Fork a child that runs `function`; return its process id and the pipe with its result."""
    reader, writer = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads: the child uses none of them
        child = os.fork()
    if child == 0:
        os.close(reader)
        _run_and_exit(function, writer, parent)
    os.close(writer)
    return child, os.fdopen(reader, "rb")


def _result(child: int, pipe: IO[bytes]) -> Any:
    with pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("The dry-run subprocess died (out of memory?). It needs about 0.5 GiB.")
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    return value


def _run_and_exit(function: Callable[[], Any], writer: int, parent: int) -> None:
    """Run `function` in the child, write its pickled result or error, and end the process."""
    threading.Thread(target=_exit_with_parent, args=[parent], daemon=True).start()
    torch.set_num_threads(1)  # a thread pool does not survive a fork; with one thread none is needed
    warnings.simplefilter("ignore")
    try:
        forget_process_groups()
        answer = pickle.dumps((True, function()))
    except BaseException as error:
        answer = _pickled(error)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)  # skips the exit handlers of the parent, which would destroy its process groups


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended: a parent that is killed does not end its children."""
    while os.getppid() == parent:
        time.sleep(POLL_INTERVAL_S)
    os._exit(1)


def _pickled(error: BaseException) -> bytes:
    trace = f"{error}\n\nIn the dry-run subprocess:\n{traceback.format_exc()}"
    if not isinstance(error, ValueError):
        return pickle.dumps((False, RuntimeError(trace)))
    try:
        return pickle.dumps((False, error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return pickle.dumps((False, ValueError(str(error))))
