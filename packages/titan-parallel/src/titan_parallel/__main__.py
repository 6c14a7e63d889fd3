"""Command line of titan-parallel: `python -m titan_parallel COMMAND` checks a model without a training run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from titan_config import ConfigError

from titan_parallel.check import command as check


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 pass, 1 fail, 2 usage error."""
    parser = argparse.ArgumentParser(prog="python -m titan_parallel", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check.add_to(commands)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
