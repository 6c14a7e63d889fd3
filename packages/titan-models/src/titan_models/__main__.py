"""Models from a shell: `titan-models download NAME --to FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titan_models.hugging_face.download import DownloadError, download


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, or 1 when it could not be done."""
    parser = argparse.ArgumentParser(prog="titan-models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    downloading = commands.add_parser("download", help="fetch weights and tokenizer of a public model")
    downloading.add_argument("name", help="the hub's name for it, like Qwen/Qwen3-0.6B")
    downloading.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    options = parser.parse_args(arguments)
    try:
        download(options.name, options.to)
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.to} holds {options.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
