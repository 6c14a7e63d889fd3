"""Startup time: imports, the first step, `--help`; imports and first step interleaved with plain PyTorch."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sizes import TOY, sized

HERE = Path(__file__).parent
RECIPE = str(HERE.parent / "recipes" / "llama3_debug.py")
ROUNDS = sized(7, 1)
IMPORT_TITAN_CONFIG = """
import sys, time
start = time.perf_counter()
import titan_config
print(1000 * (time.perf_counter() - start), "torch" in sys.modules)
"""


def seconds(*arguments: str, until: str | None = None) -> float:
    """Return the seconds of a Python process from its start to its end, or to the first line that matches `until`."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if until is not None and re.search(until, line):
                elapsed = time.perf_counter() - start
                process.kill()
                process.wait()
                return elapsed
        if process.wait() != 0 or until is not None:
            expected = "exit with code 0" if until is None else f"print a line that matches {until!r}"
            raise RuntimeError(f"{arguments} must {expected}, got exit code {process.returncode}.")
        return time.perf_counter() - start


def compare(name: str, limit: float, ours: tuple[str, ...], bare: tuple[str, ...], until: str | None = None) -> None:
    if not TOY:  # to warm up
        seconds(*ours, until=until), seconds(*bare)
    pairs = [(seconds(*ours, until=until), seconds(*bare)) for _ in range(ROUNDS)]
    ratio = statistics.median(a / b for a, b in pairs)
    our_seconds, bare_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name}: {our_seconds:.2f} s, bare {bare_seconds:.2f} s, ratio {ratio:.2f} (limit {limit})", flush=True)


def main() -> None:
    import_recipe = ("-c", f"import runpy; runpy.run_path({RECIPE!r})")
    compare("imports of a recipe", 2.0, import_recipe, ("-c", "import torch"))
    first_step = (RECIPE, "--dump_folder", "out", "--metrics.log_freq", "1")
    compare("start to end of first step", 2.0, first_step, (str(HERE / "bare.py"),), until=r"step +1/")
    added_ms = statistics.median(
        1000 * (seconds("-c", "import torch, titan_parallel") - seconds("-c", "import torch")) for _ in range(ROUNDS)
    )
    print(f"import titan_parallel after torch: {added_ms:.0f} ms (limit 300)", flush=True)
    help_s = statistics.median(seconds(RECIPE, "--help", until=None) for _ in range(ROUNDS))
    print(f"--help: {help_s:.2f} s (limit 2)", flush=True)
    command = [sys.executable, "-c", IMPORT_TITAN_CONFIG]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(ROUNDS)
    ]
    milliseconds = statistics.median(float(number) for number, _ in outputs)
    torch_loaded = any(loaded == "True" for _, loaded in outputs)
    print(f"import titan_config: {milliseconds:.0f} ms (limit 50), torch {'loaded' if torch_loaded else 'not loaded'}")


if __name__ == "__main__":
    main()
