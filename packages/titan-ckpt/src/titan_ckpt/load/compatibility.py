"""Compatibility check of a checkpoint with the parts that it is loaded into, and its error messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_config import diff

from titan_ckpt.errors import CheckpointError, join_names
from titan_ckpt.format.chunks import Chunk
from titan_ckpt.format.index import Index
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES


def describe_mismatch(index: Index, chunks: Mapping[str, Chunk], names_of_all_ranks: set[str]) -> list[str]:
    """Return the differences between the tensors of a checkpoint and of a run, one sentence a kind; empty if none.

    `chunks` are those of this rank (for missing tensors, shapes and dtypes). `names_of_all_ranks` tells which tensors
    of the checkpoint no rank holds.
    """
    missing = sorted(name for name in chunks if name not in index)
    unexpected = sorted(name for name in index if name not in names_of_all_ranks)
    shapes, dtypes = [], []
    for name, chunk in chunks.items():
        if name in index:
            stored = index[name]
            if stored.shape != chunk.shape:
                shapes.append(f"{name} (saved {list(stored.shape)}, here {list(chunk.shape)})")
            if stored.torch_dtype != chunk.data.dtype:
                dtypes.append(
                    f"{name} (saved {stored.dtype}, here {DTYPE_NAMES.get(chunk.data.dtype, chunk.data.dtype)})"
                )
    kinds: dict[str, list[str]] = {
        "missing in the checkpoint": missing,
        "only in the checkpoint": unexpected,
        "of another shape": shapes,
        "of another dtype": dtypes,
    }
    return [f"{len(names)} {kind}: {join_names(names)}" for kind, names in kinds.items() if names]


def describe_config(saved: Any, current: Any) -> list[str]:
    """Return the differences between the model configs of two runs, one a line; empty if either is unknown."""
    if not (saved and current and "model" in saved and "model" in current):
        return []
    return [f"model.{change}" for change in diff(saved["model"], current["model"])]


def check_parts(saved: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Check that the checkpoint and the run have the same parts.

    Raises:
        CheckpointError: if a part is missing or unexpected; the message names it.
    """
    missing, unexpected = sorted(set(parts) - set(saved)), sorted(set(saved) - set(parts))
    if missing or unexpected:
        raise CheckpointError(
            f"The checkpoint must have exactly the parts of the run ({', '.join(parts)}), got {', '.join(saved)}: "
            f"missing {missing}, unexpected {unexpected}. Load it into the parts that it was saved from."
        )


def raise_mismatch(folder: Path, problems: list[str], differences: list[str]) -> None:
    """Raise the error for a checkpoint that does not fit the run.

    Raises:
        CheckpointError: always.
    """
    configs = "".join(f"\n  {line}" for line in differences[:8])
    raise CheckpointError(
        f"The tensors of {folder} must have the names, shapes and dtypes of this run, got:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + (f"\nThe model configs differ (saved -> here):{configs}" if configs else "")
        + "\nNothing was loaded. Use the config that it was saved with, or another checkpoint folder."
    )
