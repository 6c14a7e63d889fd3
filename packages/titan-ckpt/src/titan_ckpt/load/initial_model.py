"""The model that a run begins with, which has no checkpoint of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.format.state_tree import Part, split_parts
from titan_ckpt.hugging_face.adapter import HFAdapter
from titan_ckpt.hugging_face.base_folder import BASE_MODEL, forget_base_model, keep_base_model
from titan_ckpt.hugging_face.load import load_hf
from titan_ckpt.hugging_face.weight_files import folder_of
from titan_ckpt.load.load import damage_of, load_parts
from titan_ckpt.torch_parts import to_parts

logger = logging.getLogger(__name__)


def begin_with(
    path: Path | None,
    in_hf: bool,
    parts: Mapping[str, Part],
    checkpoint_folder: CheckpointFolder,
    ranks: CollectiveGuard,
    find_adapter: Callable[[], HFAdapter],
    run_config: Any,
) -> None:
    """Fill the part "model" from the checkpoint at `path`, or from Hugging Face weights: a collective of all ranks.

    What exports keep of the base model is copied beside the run's checkpoints. Without a path nothing is filled.

    Raises:
        CheckpointError: when there is no such part, or what is at `path` is not whole or does not fit it.
    """
    ranks.together(lambda: _keep_base(path, in_hf, checkpoint_folder) if ranks.is_first else None)
    if path is None:
        return
    if "model" not in parts:
        raise CheckpointError(f'Parts to fill from initial_load_path must hold "model", got {list(parts)}. Name it so.')
    model = to_parts({"model": parts["model"]})
    if in_hf:
        _load_hf(path, model, ranks, find_adapter)
    else:
        damage = damage_of(path, ranks)
        if damage:
            raise BrokenCheckpoint(
                f"initial_load_path must be a whole checkpoint, a folder step-N (of Hugging Face weights with "
                f"initial_load_in_hf), got {path}: {damage}."
            )
        load_parts(path, model, ranks, run_config, exactly=False)
    logger.info("Began with the model of %s.", path)


def _load_hf(
    path: Path, model: Mapping[str, Any], ranks: CollectiveGuard, find_adapter: Callable[[], HFAdapter]
) -> None:
    tensors, _, states = ranks.together(lambda: split_parts(model))
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    elsewhere = set().union(*ranks.gather(set(weights))) - weights.keys()
    ranks.together(lambda: load_hf(path, weights, find_adapter(), elsewhere))
    ranks.together(lambda: model["model"].load_state_dict(dict(states["model"])))


def _keep_base(path: Path | None, in_hf: bool, checkpoint_folder: CheckpointFolder) -> None:
    """Copy beside the checkpoints what exports keep of the folder, or the run, that this run begins with."""
    if path is not None and not in_hf:
        path = path.parent / BASE_MODEL
    if path is not None and path.exists():
        keep_base_model(folder_of(path), checkpoint_folder.folder)
    else:
        forget_base_model(checkpoint_folder.folder)
