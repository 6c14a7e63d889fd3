"""Entry point of a recipe: command line, training, error report."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from titan_config import cli
from titan_parallel import adopt_launcher

from titan_trainer.errors import reported_errors
from titan_trainer.trainer import Trainer


def main(recipe: Callable[[], Trainer.Config], argv: Sequence[str] | None = None) -> Trainer:
    """Train the config that `recipe` returns, with the flags of the command line applied; return the trainer.

    `argv` None takes the flags of this process. ValueError, OSError and NonFiniteError end the process with exit code 1
    and a short report. Two flags end it without training: `--plan` prints a dry run (memory, FLOPs, communication; see
    `titan_trainer.planning`), `--generate TEXT` prints text from the newest checkpoint (`titan_trainer.generating`).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        adopt_launcher()  # sets RANK under srun and mpirun, so that --plan and --generate print on rank 0 only
    except ValueError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    if "--plan" in arguments:
        from titan_trainer.planning import print_plan

        sys.exit(print_plan(recipe, arguments))
    if any(argument.split("=")[0] == "--generate" for argument in arguments):
        from titan_trainer.generating import print_generated_text

        sys.exit(print_generated_text(recipe, arguments))
    config: Any = cli(recipe, arguments)
    logging.basicConfig(format=f"[rank {os.environ.get('RANK', '0')}] %(message)s", level=logging.WARNING)
    with reported_errors(config.dump_folder):
        trainer: Trainer = config.build()
        trainer.train()
        return trainer
