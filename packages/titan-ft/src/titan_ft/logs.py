"""Silence torchft's loggers."""

from __future__ import annotations

import os


def silence_torchft_logging() -> None:
    """Limit the logs of torchft's Rust code to warnings, unless the environment variable RUST_LOG is set.

    The default level writes a dozen lines a step. Call this before torchft is imported.
    """
    os.environ.setdefault("RUST_LOG", "warn")
