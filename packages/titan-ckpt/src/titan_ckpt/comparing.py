"""Whether a checkpoint fits what it is to be loaded into, and what to tell a person when it does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ckpt.chunks import Chunk
from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.files import DTYPE_NAMES
from titan_ckpt.index import Index


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
    """Return how the two runs' model configs differ, one line a setting; empty when either is unknown."""
    saved_model, model = _model_of(saved), _model_of(current)
    if saved_model is None or model is None:
        return []
    old, new = _flat(saved_model), _flat(model)
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key, "nothing") != new.get(key, "nothing")]
    return [f"model{key}: saved {old.get(key, 'nothing')!r}, here {new.get(key, 'nothing')!r}" for key in changed]


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
        + (f"\nThe models' settings differ:{configs}" if configs else "")
        + "\nUse the settings it was saved with, or another folder."
    )


def _model_of(config: Any) -> Any:
    return config.get("model") if isinstance(config, Mapping) else None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = [(f"{path}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{path}[{place}]", item) for place, item in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, item in items for key, leaf in _flat(item, name).items()}
