"""Fixtures of all tests in the repository: `run_ranks` forks ranks of a gloo group and returns the result of each.

`in_fp64` and `fp64_model` run a reference entirely in fp64: weights, buffers, and code that casts to fp32.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forking is not safe with an OpenMP thread pool
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # set by shells for background jobs; tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _rank_main(
    rank: int, world_size: int, rendezvous: Path, function: Callable[..., Any], args: tuple, pipe: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(rendezvous), world_size), rank=rank, world_size=world_size
        )
        dist.barrier()  # all ranks must connect before one finishes
        pipe.send_bytes(pickle.dumps((True, function(*args))))  # copies, since shared memory ends with the process
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)  # skip exit handlers inherited from the parent


def _run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 1200) -> list[Any]:
    """Call `function(*args)` on `world_size` forked ranks; return their results in order of rank.

    `function` may be a closure; results must be picklable. Forking takes a second, so run many cases in one call.
    Raises RuntimeError with the traceback of the first rank that failed, after killing the others; or if no rank
    returns within `timeout_s`, which is meant for ranks that hang.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            target_args = (rank, world_size, Path(folder, "store"), function, args, sender)
            process = context.Process(target=_rank_main, args=target_args, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        results: dict[int, Any] = {}
        try:
            while len(results) < world_size:
                waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = multiprocessing.connection.wait(waiting, timeout_s)
                if not ready:
                    silent = sorted(set(range(world_size)) - set(results))
                    raise RuntimeError(f"Ranks must return within {timeout_s} s, got no result from ranks {silent}.")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        succeeded, value = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        processes[rank].join()
                        succeeded, value = False, f"The process exited with code {processes[rank].exitcode}."
                    if not succeeded:
                        raise RuntimeError(f"Rank {rank} of {world_size} failed:\n{value}")
                    results[rank] = value
        finally:
            for process in processes:
                if len(results) < world_size:
                    process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world_size, function, *args)`: see `_run_ranks`."""
    return _run_ranks


@functools.cache
def _fp32_means_fp64() -> Any:
    """Return a torch function mode that replaces fp32 by fp64. (torch is imported here: titan-config has none.)"""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as pytree

    class Fp32MeansFp64(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.float:
                function = torch.Tensor.double
            args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
            return function(*args, **kwargs)

    return Fp32MeansFp64()


@contextmanager
def _in_fp64() -> Iterator[None]:
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _fp32_means_fp64():
            yield
    finally:
        torch.set_default_dtype(default)


def _fp64_model(model: Any, state: Mapping[str, Any] | None = None) -> Any:
    import torch

    narrow = [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype is not torch.float64]
    model.double()
    if state is not None:
        missing = [name for name in narrow if name not in state]
        assert not missing, f"state must have fp64 values of weights loaded in lower precision, got none of: {missing}"
        with torch.no_grad():
            for name in narrow:
                model.get_parameter(name).copy_(state[name])
    return model


@pytest.fixture(scope="session")
def in_fp64() -> Callable[[], Any]:
    """`with in_fp64():` code that casts to fp32 (norms, RoPE, routers) computes in fp64 instead."""
    return _in_fp64


@pytest.fixture(scope="session")
def fp64_model() -> Callable[..., Any]:
    """`fp64_model(model, state=None)`: cast all parameters and buffers of the model to fp64.

    Weights loaded in a lower precision have been rounded; their values are taken from `state`, by name. Call the model
    within `in_fp64()`. The backward may be outside, unless activations are recomputed.
    """
    return _fp64_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden configs of the recipes")
    parser.addoption("--shard", metavar="K/N", type=_shard, default=(1, 1), help="run the K-th of N equal parts")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"--shard must be K/N with 1 <= K <= N, got {text!r}.")
    return int(index), int(count)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = config.getoption("--shard")
    # Neighboring tests take about equally long: deal them out round-robin. The order stays, so that a module or session
    # fixture is built once per shard.
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % count != index - 1])
    items[:] = items[index - 1 :: count]
