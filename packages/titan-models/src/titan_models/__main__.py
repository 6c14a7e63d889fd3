"""Command line of titan-models: `titan-models download NAME --to FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titan_models.hugging_face.download import DownloadError, download


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 1 where it failed."""
    parser = argparse.ArgumentParser(prog="titan-models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    downloading = commands.add_parser("download", help="download weights and tokenizer from the Hugging Face hub")
    downloading.add_argument("name", help="repository name on the hub, such as Qwen/Qwen3-0.6B")
    downloading.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to create")
    options = parser.parse_args(arguments)
    try:
        download(options.name, options.to)
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Downloaded {options.name} to {options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
