"""Run the examples of Markdown pages: `python tools/run_docs.py README.md docs`. A folder stands for all its pages.

The `python` blocks of a page are one program, run from top to bottom in an empty folder. Its `bash` blocks are one
script, run in another folder that sees `recipes/` and `docs/` of the checkout; it stops at the first command that
fails. Blocks of other languages (`py`, `sh`, `text`) are not run. Line numbers in a traceback are those of the page.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNNERS = {"python": [sys.executable, "-P"], "bash": ["bash", "-euo", "pipefail"]}


def program_of(page: str, language: str) -> str:
    """Return the blocks of `language`; every other line is empty, so that line numbers are those of the page."""
    lines, current = [], ""
    for line in page.splitlines():
        if line.startswith("```"):
            current = "" if current else line.removeprefix("```").strip() or "text"
            lines.append("")
        else:
            lines.append(line if current == language else "")
    return "\n".join(lines)


def run(path: Path, language: str, program: str) -> bool:
    """Run one program of a page, print the result, and return whether it passed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        script, work = Path(folder, path.stem), Path(folder, "work")
        script.write_text(program, encoding="utf-8")
        work.mkdir()
        if language == "bash":
            for name in ("recipes", "docs"):
                (work / name).symlink_to(ROOT / name)
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        command = [*RUNNERS[language], str(script)]
        result = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    passed = result.returncode == 0
    seconds = time.perf_counter() - start
    print(f"{path} ({language}): {'passed' if passed else 'FAILED'} in {seconds:.1f} s", flush=True)
    if not passed:
        print(result.stdout + result.stderr)
    return passed


def pages_of(arguments: Iterable[str]) -> Iterator[Path]:
    for argument in map(Path, arguments):
        yield from sorted(argument.rglob("*.md")) if argument.is_dir() else [argument]


if __name__ == "__main__":
    results = []
    for page in pages_of(sys.argv[1:]):
        for language in RUNNERS:
            if (program := program_of(page.read_text(encoding="utf-8"), language)).strip():
                results.append(run(page, language, program))
    print(f"{sum(results)} of {len(results)} programs passed")
    sys.exit(not all(results))
