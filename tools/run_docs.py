"""Run the Python examples of Markdown pages: `python tools/run_docs.py README.md docs/*.md`.

The ```python blocks of a page form one program, run in a separate process in an empty folder. Blocks that begin with
```python notest are skipped. Line numbers in a traceback are those of the page.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path


def program_of(page: str) -> str:
    """Return the page's Python blocks, with all other lines empty so that line numbers stay the same."""
    lines, language = [], ""
    for line in page.splitlines():
        if line.startswith("```"):
            language = "" if language else line.removeprefix("```").strip() or "text"
            lines.append("")
        else:
            lines.append(line if language == "python" else "")
    return "\n".join(lines)


def run(path: Path) -> bool:
    """Run the examples of one page, print the result, and return whether they passed."""
    program = program_of(path.read_text(encoding="utf-8"))
    if not program.strip():
        print(f"{path}: no examples")
        return True
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        script, empty = Path(folder, f"{path.stem}.py"), Path(folder, "empty")
        script.write_text(program, encoding="utf-8")
        empty.mkdir()
        command = [sys.executable, "-P", script]
        result = subprocess.run(command, cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(
        f"{path}: {'passed' if result.returncode == 0 else 'FAILED'} in {time.perf_counter() - start:.1f} s", flush=True
    )
    if result.returncode != 0:
        print(result.stdout + result.stderr)
    return result.returncode == 0


if __name__ == "__main__":
    results = [run(Path(argument)) for argument in sys.argv[1:]]
    print(f"{sum(results)} of {len(results)} pages passed")
    sys.exit(not all(results))
