"""`python -m titan_parallel check`: the check of a model, from a shell."""

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

RECOMPUTATIONS = {
    "none": None,
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
}


def add_to(commands: Any) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "check",
        help="is a model on a mesh the same run as in one process?",
        description="Train a small model for a few steps in one process and on each mesh, on CPU, and compare. "
        "Exit code 0: all agree; 1: they do not; 2: the question is wrong.",
    )
    parser.add_argument("build", nargs="?", metavar="MODULE:FUNCTION", help="makes the small model, without arguments")
    parser.add_argument("--hf", type=Path, metavar="CONFIG", help="in its place: config.json of a Hugging Face model")
    parser.add_argument("--mesh", nargs="+", default=[], help="by name: fsdp2, tp2_sp, fsdp2_tp2, ddp2, pp2, cp2, ...")
    parser.add_argument("--parallelism", nargs="+", default=[], metavar="FIELD=VALUE", help="one mesh, by its degrees")
    parser.add_argument("--world-size", type=int, help="ranks (the product of the degrees)")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=2, help="of each data rank in a step")
    parser.add_argument("--recompute", choices=tuple(RECOMPUTATIONS), default="none")
    parser.add_argument("--compile", metavar="BACKEND", help="compile each block: inductor, aot_eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for a mesh")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    named = meshes(*chosen.mesh)
    if chosen.parallelism:
        named[" ".join(chosen.parallelism)] = _config(chosen.parallelism)
    if not named:
        raise ConfigError("Got no mesh. A check compares meshes with one process. Give --mesh fsdp2 tp2_sp, say.")
    report = check_parallel(
        _builder(chosen),
        named,
        dtype=getattr(torch, chosen.dtype),
        steps=chosen.steps,
        num_microbatches=chosen.microbatches,
        activation_checkpoint=RECOMPUTATIONS[chosen.recompute],
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
    """`["tensor_parallel_degree=2", "sequence_parallel=false"]` as a config."""
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
        raise ConfigError("Got no model, or two. One is checked. Give MODULE:FUNCTION, or --hf config.json.")
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
            f"Got {chosen.build!r}, which gives no function ({error}). A model is made by a function of a module that "
            "can be imported from here. Write my_models:small_model, say."
        ) from error
    return build
