"""Error reporting: a short message on the terminal, the traceback in a file."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class NonFiniteError(RuntimeError):
    """A loss or gradient norm that is not finite; raised on every rank before the weights are updated."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the entry of `names` closest to `name`, quoted; the first entry if none is similar."""
    names = list(names)
    return repr(next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.0)), names[0]))


@contextmanager
def reported_errors(dump_folder: Path) -> Iterator[None]:
    """Exit with code 1 and a short report if the block raises ValueError, OSError or NonFiniteError.

    The report is the message of the error, printed to stderr; every rank raises NonFiniteError, so only rank 0 prints
    it. The traceback goes to `dump_folder/error_rank<r>.txt`. Other exceptions are bugs and propagate unchanged.
    """
    try:
        yield
    except (ValueError, OSError, NonFiniteError) as error:
        rank = int(os.environ.get("RANK", "0"))
        prefix = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        lines = [f"{prefix}error: {error}"]
        report, text = dump_folder / f"error_rank{rank}.txt", traceback.format_exc()
        with suppress(OSError):  # dump_folder itself may be the cause of the error
            dump_folder.mkdir(parents=True, exist_ok=True)
            report.write_text(text)
            lines.append(f"{prefix}(traceback: {report})")
        if rank == 0 or not isinstance(error, NonFiniteError):
            print("\n".join(lines), file=sys.stderr, flush=True)
        sys.exit(1)
