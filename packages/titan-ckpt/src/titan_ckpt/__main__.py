"""Look at checkpoints from a shell: `python -m titan_ckpt list|verify|export-model|export-hf PATH`."""

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
    """Run a command; return 0, or 1 when a checkpoint is broken or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m titan_ckpt", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="name the checkpoints in a folder")
    listing.add_argument("path", type=Path, help="folder that holds step-N folders")
    listing.set_defaults(run=_list)
    verify = commands.add_parser("verify", help="check every file of a checkpoint against its checksum")
    verify.add_argument("path", type=Path, help="a folder step-N")
    verify.set_defaults(run=_verify)
    export = commands.add_parser("export-hf", help="write a checkpoint's model for Hugging Face transformers")
    export.add_argument("path", type=Path, help="a folder step-N")
    export.add_argument("folder", type=Path, help="a new folder")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="round the weights to this type")
    export.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer is copied")
    export.add_argument(
        "--base-model", type=Path, help="the Hugging Face folder that the run began with, if it is elsewhere now"
    )
    export.set_defaults(run=_export)
    model = commands.add_parser("export-model", help="write a checkpoint's model alone, as a checkpoint")
    model.add_argument("path", type=Path, help="a folder step-N")
    model.add_argument("folder", type=Path, help="folder to hold it")
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
            manifest = read_manifest(checkpoint_folder.path(step))
        except CheckpointError as error:
            print(f"{checkpoint_folder.path(step)}  broken: {error}")
            continue
        gibibytes = sum(record.size for record in manifest.files.values()) / 2**30
        print(f"{checkpoint_folder.path(step)}  {gibibytes:.3f} GiB, saved by {manifest.world_size} ranks")


def _verify(options: argparse.Namespace) -> None:
    manifest = check_whole(options.path)
    print(f"{options.path} is whole: step {manifest.step}, {len(manifest.files)} files")


def _export(options: argparse.Namespace) -> None:
    dtype = options.dtype and getattr(torch, options.dtype)
    export_hf(options.path, options.folder, dtype, tokenizer=options.tokenizer, base_model=options.base_model)
    print(f"{options.folder} holds the model of {options.path}")


def _export_model(options: argparse.Namespace) -> None:
    print(f"{export_model(options.path, options.folder)} holds the model of {options.path}")


if __name__ == "__main__":
    sys.exit(main())
