"""Whether a checkpoint fits what it is to be loaded into, and what to tell a person when it does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_config import diff

from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.format.chunks import Chunk
from titan_ckpt.format.index import Index
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES


def describe_misfit(index: Index, chunks: Mapping[str, Chunk], names_of_all_ranks: set[str]) -> list[str]:
    """Return how a checkpoint's tensors differ from those of a run, one sentence a kind; empty when they fit.

    `chunks` are those of this rank (what is missing or of another shape or type), `names_of_all_ranks` tells what
    nobody has.
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
        "of another type": dtypes,
    }
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]


def describe_config(saved: Any, current: Any) -> list[str]:
    """Return how the models of two runs' configs differ, one line a setting; empty when either is unknown."""
    if not (saved and current and "model" in saved and "model" in current):
        return []
    return [f"model.{change}" for change in diff(saved["model"], current["model"])]


def check_parts(saved: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Check that a checkpoint has exactly these parts.

    Raises:
        CheckpointError: naming the parts that are missing or unexpected.
    """
    missing, unexpected = sorted(set(parts) - set(saved)), sorted(set(saved) - set(parts))
    if missing or unexpected:
        raise CheckpointError(
            f"Got a checkpoint of the parts {', '.join(saved)} to load into {', '.join(parts)}. A checkpoint must "
            f"have exactly the parts of the run: missing {missing}, unexpected {unexpected}. Give the parts it was "
            f"saved with."
        )


def raise_misfit(folder: Path, problems: list[str], differences: list[str]) -> None:
    """Raise the error that says how a checkpoint does not fit.

    Raises:
        CheckpointError: always.
    """
    configs = "".join(f"\n  {line}" for line in differences[:8])
    raise CheckpointError(
        f"Got {folder}, which does not fit this run. Its tensors must have the names, shapes and types of those here, "
        f"and nothing was loaded:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + (f"\nThe models' settings differ (saved -> here):{configs}" if configs else "")
        + "\nUse the settings it was saved with, or another folder."
    )
