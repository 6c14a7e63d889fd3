"""torchft's own talk."""

from __future__ import annotations

import os


def calm_torchft() -> None:
    """Let torchft's Rust side tell of warnings only, unless the environment's RUST_LOG says otherwise.

    It would write a dozen lines a step. To be called before torchft is imported.
    """
    os.environ.setdefault("RUST_LOG", "warn")
