"""The shell command `python -m titan_parallel check`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from titan_config import ConfigError
from torch import nn

from titan_parallel.check.check_parallel import check_parallel
from titan_parallel.check.hugging_face import build_small
from titan_parallel.check.mesh_names import meshes
from titan_parallel.memory.activation_checkpoint import FullActivationCheckpoint, SelectiveActivationCheckpoint
from titan_parallel.memory.compile import Compile
from titan_parallel.mesh.parallel_dims import ParallelDims

ACTIVATION_CHECKPOINTS = {
    "none": None,
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
}


def add_to(commands: Any) -> None:
    """Add the command `check` to the subparsers of the program."""
    parser = commands.add_parser(
        "check",
        help="compare training on a device mesh with training in one process",
        description="Train a small model for a few steps in one process and on each mesh, on CPU, and compare. "
        "Exit codes: 0 all meshes match, 1 a mesh differs or fails, 2 usage error.",
    )
    parser.add_argument("build", nargs="?", metavar="MODULE:FUNCTION", help="function that returns the small model")
    parser.add_argument(
        "--hf", type=Path, metavar="CONFIG", help="config.json of a Hugging Face model, instead of MODULE:FUNCTION"
    )
    parser.add_argument(
        "--mesh", nargs="+", default=[], help="mesh names: fsdp2, tp2_sp, fsdp2_tp2, ddp2, pp2, cp2, ..."
    )
    parser.add_argument(
        "--parallelism", nargs="+", default=[], metavar="FIELD=VALUE", help="a mesh, by fields of ParallelDims.Config"
    )
    parser.add_argument("--world-size", type=int, help="number of ranks (default: the product of the degrees)")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="dtype of the model")
    parser.add_argument("--steps", type=int, default=3, help="number of training steps")
    parser.add_argument("--microbatches", type=int, default=2, help="micro-batches of each data rank in a step")
    parser.add_argument(
        "--recompute",
        choices=tuple(ACTIVATION_CHECKPOINTS),
        default="none",
        help="activation checkpointing (recomputation) on the mesh",
    )
    parser.add_argument(
        "--compile", metavar="BACKEND", help="torch.compile backend for each block: inductor, aot_eager"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the synthetic batch")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the ranks of a mesh")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    named = meshes(*chosen.mesh)
    if chosen.parallelism:
        named[" ".join(chosen.parallelism)] = _config(chosen.parallelism)
    if not named:
        raise ConfigError("A mesh must be given, got none. Add --mesh fsdp2 tp2_sp, for example, or --parallelism.")
    report = check_parallel(
        _builder(chosen),
        named,
        dtype=getattr(torch, chosen.dtype),
        steps=chosen.steps,
        num_microbatches=chosen.microbatches,
        activation_checkpoint=ACTIVATION_CHECKPOINTS[chosen.recompute],
        compile=None if chosen.compile is None else Compile.Config(backend=chosen.compile),
        world_size=chosen.world_size,
        seed=chosen.seed,
        timeout_s=chosen.timeout,
    )
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report)
    for mesh in report.meshes.values():
        if mesh.trace and not chosen.json:
            print(f"\n{mesh.name}:\n{mesh.trace}", file=sys.stderr)
    return 0 if report.ok else 1


def _config(assignments: list[str]) -> ParallelDims.Config:
    """Return the config of assignments such as `["tensor_parallel_degree=2", "sequence_parallel=false"]`."""
    config = ParallelDims.Config()
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            setattr(config, name, json.loads(value))
        except json.JSONDecodeError:
            setattr(config, name, value)
    return config


def _builder(chosen: argparse.Namespace) -> Callable[[], nn.Module]:
    if (chosen.build is None) == (chosen.hf is None):
        got = "neither" if chosen.build is None else "both"
        raise ConfigError(f"Exactly one of MODULE:FUNCTION and --hf must be given, got {got}.")
    if chosen.hf is not None:
        build, note = build_small(chosen.hf)
        print(note, file=sys.stderr)
        return build
    module_name, _, function = chosen.build.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"MODULE:FUNCTION must name a function that can be imported from the current folder, got {chosen.build!r} "
            f"({error}). Write my_models:small_model, for example."
        ) from error
    return build
