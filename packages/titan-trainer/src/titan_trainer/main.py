"""What a recipe's `if __name__ == "__main__"` calls."""

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
    """Train what `recipe` returns, as changed by the command line; return the trainer at the end.

    An error that its user can mend ends the process with code 1 and one short report. With `--plan` on the command
    line nothing is trained, nor with `--generate TEXT`: see `titan_trainer.planning` and `titan_trainer.generating`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        adopt_launcher()  # of the ranks that srun or mpirun starts, too, one speaks
    except ValueError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    if "--plan" in words:
        from titan_trainer.planning import print_plan

        sys.exit(print_plan(recipe, words))
    if any(word.split("=")[0] == "--generate" for word in words):
        from titan_trainer.generating import print_continuations

        sys.exit(print_continuations(recipe, words))
    config: Any = cli(recipe, words)
    logging.basicConfig(format=f"[rank {os.environ.get('RANK', '0')}] %(message)s", level=logging.WARNING)
    with reported_errors(config.dump_folder):
        trainer: Trainer = config.build()
        trainer.train()
        return trainer
