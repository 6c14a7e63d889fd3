"""Reject names that the project no longer uses, in code, docs and flags. docs/glossary.md has the terms in use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RETIRED = {
    "FullRecompute": "FullActivationCheckpoint",
    "SelectiveRecompute": "SelectiveActivationCheckpoint",
    "EveryNthBlock": "PeriodicActivationCheckpoint",
    "look_ahead": "mtp",
    "LookAhead": "MultiTokenPrediction",
    "own_loss": "auxiliary_loss",
    "OwnLoss": "AuxiliaryLoss",
    "tally": "step counter",
    "tallies": "step statistics",
    "realise": "build_mask",
    "realised": "built",
    "MaskLimit": "MaskModifier",
    "outline": "batch_spec",
    "shelf": "checkpoint folder",
    "passed_over": "skipped",
    "num_tensor": "tp_size",
    "num_context": "cp_size",
    "num_shard": "dp_shard_size",
    "num_pipeline": "pp_size",
    "place_of": "coordinate_of",
    "names_elsewhere": "nonlocal_parameters",
    "counted_elsewhere": "duplicate_parameters",
    "somebody": "user, or third-party",
    "somebody's": "custom, or third-party",
    "anybody": "anyone",
    "anybody's": "any",
    "one's own": "custom",
}
"""`{retired word: word in use}`."""

SKIPPED = {"CHANGELOG.md", "tools/retired_words.py"}
SUFFIXES = {".md", ".py", ".toml", ".yaml", ".yml"}


def find(path: str, text: str) -> list[str]:
    """Return a line for each retired word in `text`."""
    words = "|".join(sorted(map(re.escape, RETIRED), key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)({words})(?!\w)")
    return [
        f"{path}:{number}: {match[1]!r} is retired, write {RETIRED[match[1]]!r}"
        for number, line in enumerate(text.splitlines(), start=1)
        for match in pattern.finditer(line)
    ]


def main() -> None:
    """Print retired words in the files of the repository, and exit with 1 if there are any."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [path for path in listed.splitlines() if Path(path).suffix in SUFFIXES and path not in SKIPPED]
    found = [line for path in files if (ROOT / path).exists() for line in find(path, (ROOT / path).read_text())]
    for line in found:
        print(line)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
