"""How a run ends badly: one clear report on one screen, the traceback in a file."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a finite number; raised on every rank before the weights are touched."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` most like `name`, quoted; the first where none is like it."""
    names = list(names)
    return repr(next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.0)), names[0]))


@contextmanager
def reported_errors(dump_folder: Path) -> Iterator[None]:
    """End the process with code 1 and one short report if what runs inside fails for a reason its user can mend.

    ValueError, OSError and NonFiniteError carry their own advice: their message is shown (by the first rank only, where
    every rank raises it), and the traceback goes to `dump_folder/error_rank<r>.txt`. Anything else is a defect and
    keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, NonFiniteError) as error:
        rank = int(os.environ.get("RANK", "0"))
        prefix = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        lines = [f"{prefix}error: {error}"]
        report, text = dump_folder / f"error_rank{rank}.txt", traceback.format_exc()
        with suppress(OSError):  # what went wrong may be this very folder
            dump_folder.mkdir(parents=True, exist_ok=True)
            report.write_text(text)
            lines.append(f"{prefix}(traceback: {report})")
        if rank == 0 or not isinstance(error, NonFiniteError):
            print("\n".join(lines), file=sys.stderr, flush=True)
        sys.exit(1)
