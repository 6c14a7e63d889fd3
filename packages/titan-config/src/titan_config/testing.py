"""For the tests of recipes: their full config is committed as text, and review reads what changes in it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from titan_config.configurable import Config
from titan_config.text import to_text


def check_golden(config: Config, path: str | os.PathLike[str]) -> None:
    """Raise AssertionError unless the file at `path` holds `to_text(config)`; with TITAN_UPDATE_GOLDEN=1 write it.

    Example: `check_golden(llama3_8b(), Path(__file__).parent / "golden" / "llama3_8b.txt")`.
    """
    path, text = Path(path), to_text(config)
    if os.environ.get("TITAN_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    golden = path.read_text(encoding="utf-8") if path.exists() else ""
    if golden != text:
        lines = difflib.unified_diff(golden.splitlines(), text.splitlines(), "committed", "now", lineterm="", n=0)
        raise AssertionError(
            f"Got a config that differs from {path}:\n" + "\n".join(lines) + "\nThe committed text must say what the "
            "recipe does. If the change is meant, run again with TITAN_UPDATE_GOLDEN=1 and commit the file."
        )
