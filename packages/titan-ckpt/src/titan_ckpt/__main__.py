"""Inspect and export checkpoints from a shell: `python -m titan_ckpt list|verify|export-model|export-hf PATH`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import read_manifest
from titan_ckpt.format.verify import check_whole
from titan_ckpt.hugging_face.export import export_hf
from titan_ckpt.model_export import export_model
from titan_ckpt.paths import local_path


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code.

    0: success. 1: the checkpoint is broken, or cannot be read or exported. argparse itself exits with 2 on a usage
    error.
    """
    parser = argparse.ArgumentParser(prog="python -m titan_ckpt", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="list the checkpoints in a folder")
    listing.add_argument("path", type=Path, help="folder that contains the step-N folders")
    listing.set_defaults(run=_list)
    verify = commands.add_parser("verify", help="verify every file of a checkpoint against its checksum")
    verify.add_argument("path", type=Path, help="checkpoint folder (step-N)")
    verify.set_defaults(run=_verify)
    export = commands.add_parser("export-hf", help="export the model of a checkpoint for Hugging Face transformers")
    export.add_argument("path", type=Path, help="checkpoint folder (step-N)")
    export.add_argument("folder", type=Path, help="output folder; must not exist yet")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the exported weights (default: as saved)"
    )
    export.add_argument("--tokenizer", type=Path, help="folder to copy the tokenizer files from")
    export.add_argument(
        "--base-model", type=Path, help="Hugging Face folder that the run was initialized from, if it has moved since"
    )
    export.set_defaults(run=_export)
    model = commands.add_parser("export-model", help="write a checkpoint that contains only the model")
    model.add_argument("path", type=Path, help="checkpoint folder (step-N)")
    model.add_argument("folder", type=Path, help="output folder; the model is written to its subfolder step-N")
    model.set_defaults(run=_export_model)
    options = parser.parse_args(arguments)
    try:
        for name, value in vars(options).items():
            if isinstance(value, Path):
                local_path(value, name)
        options.run(options)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _list(options: argparse.Namespace) -> None:
    checkpoint_folder = CheckpointFolder(options.path)
    for step in checkpoint_folder.steps():
        try:
            manifest = read_manifest(checkpoint_folder.step_path(step))
        except CheckpointError as error:
            print(f"{checkpoint_folder.step_path(step)}  broken: {error}")
            continue
        gibibytes = sum(record.size for record in manifest.files.values()) / 2**30
        print(f"{checkpoint_folder.step_path(step)}  {gibibytes:.3f} GiB, saved by {manifest.world_size} ranks")


def _verify(options: argparse.Namespace) -> None:
    manifest = check_whole(options.path)
    print(f"{options.path} is valid: step {manifest.step}, {len(manifest.files)} files")


def _export(options: argparse.Namespace) -> None:
    dtype = options.dtype and getattr(torch, options.dtype)
    export_hf(options.path, options.folder, dtype, tokenizer=options.tokenizer, base_model=options.base_model)
    print(f"Exported the model of {options.path} to {options.folder}.")


def _export_model(options: argparse.Namespace) -> None:
    print(f"Exported the model of {options.path} to {export_model(options.path, options.folder)}.")


if __name__ == "__main__":
    sys.exit(main())
