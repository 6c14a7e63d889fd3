"""Initial weights of a run that has no checkpoint of its own (`initial_load_path`)."""

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
from titan_ckpt.hugging_face.base_folder import BASE_MODEL, copy_base_model, delete_base_model
from titan_ckpt.hugging_face.load import load_hf
from titan_ckpt.hugging_face.weight_files import folder_of
from titan_ckpt.load.load import describe_damage, load_parts
from titan_ckpt.torch_parts import to_parts

logger = logging.getLogger(__name__)


def load_initial_model(
    path: Path | None,
    in_hf: bool,
    parts: Mapping[str, Part],
    checkpoint_folder: CheckpointFolder,
    guard: CollectiveGuard,
    find_adapter: Callable[[], HFAdapter],
    run_config: Any,
) -> None:
    """Load the part "model" from the checkpoint at `path`, or from Hugging Face weights; a collective of all ranks.

    The files of the base model that exports need are copied beside the checkpoints of this run. Without a path nothing
    is loaded.

    Raises:
        CheckpointError: if there is no part "model", or the weights at `path` are broken or do not fit it.
    """
    guard.run_on_all(lambda: _copy_base_model_files(path, in_hf, checkpoint_folder) if guard.is_first else None)
    if path is None:
        return
    if "model" not in parts:
        raise CheckpointError(f'initial_load_path needs a part named "model", got the parts {list(parts)}.')
    model = to_parts({"model": parts["model"]})
    if in_hf:
        _load_hf(path, model, guard, find_adapter)
    else:
        damage = describe_damage(path, guard)
        if damage:
            raise BrokenCheckpoint(
                f"initial_load_path must be a valid checkpoint (a folder step-N), got {path}: {damage}. For Hugging "
                "Face weights, set initial_load_in_hf."
            )
        load_parts(path, model, guard, run_config, exactly=False)
    logger.info("Initialized the model from %s.", path)


def _load_hf(
    path: Path, model: Mapping[str, Any], guard: CollectiveGuard, find_adapter: Callable[[], HFAdapter]
) -> None:
    tensors, _, states = guard.run_on_all(lambda: split_parts(model))
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    nonlocal_weights = set().union(*guard.all_gather(set(weights))) - weights.keys()
    guard.run_on_all(lambda: load_hf(path, weights, find_adapter(), nonlocal_weights))
    guard.run_on_all(lambda: model["model"].load_state_dict(dict(states["model"])))


def _copy_base_model_files(path: Path | None, in_hf: bool, checkpoint_folder: CheckpointFolder) -> None:
    """Copy the base model files of `path`, or of the run that saved `path`, beside the checkpoints of this run."""
    if path is not None and not in_hf:
        path = path.parent / BASE_MODEL
    if path is not None and path.exists():
        copy_base_model(folder_of(path), checkpoint_folder.path)
    else:
        delete_base_model(checkpoint_folder.path)
