"""Export the model of a checkpoint, without optimizer and data state (a third of the size), to start other runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.chunks import Chunk
from titan_ckpt.format.readers import TensorReader, read_config, read_values
from titan_ckpt.format.safetensors_writer import write_tensors
from titan_ckpt.format.verify import check_whole
from titan_ckpt.hugging_face.base_folder import BASE_MODEL, copy_base_model
from titan_ckpt.save.save import Snapshot, save
from titan_ckpt.save.write_plan import make_plan


def export_model(checkpoint: Path, folder: Path) -> Path:
    """Write the part "model" of `checkpoint` as a new checkpoint below `folder`; return its path, `folder / step-N`.

    Another run loads it through `initial_load_path`. The files of the base model that Hugging Face exports need are
    copied with it.

    Raises:
        BrokenCheckpoint: if the checkpoint is not valid.
        CheckpointError: if it has no model, or `folder` already has a checkpoint of that step.
    """
    manifest = check_whole(checkpoint)
    values = read_values(checkpoint)
    if "model" not in values:
        raise CheckpointError(f'{checkpoint} must have the part "model", got {list(values)}.')
    with TensorReader(checkpoint) as reader:
        names = [name for name in reader.index if name.startswith("model.")]
        tensors = {name: reader.read(name) for name in names}
    chunks = [Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()]
    checkpoint_folder = CheckpointFolder(folder)
    guard = CollectiveGuard(alone=True)
    write = partial(write_tensors, tensors={chunk.key: chunk.data for chunk in chunks})
    snapshot = Snapshot(manifest.step, make_plan(chunks, frozenset(), guard), write, {"model": values["model"]})
    save(snapshot, checkpoint_folder, guard, read_config(checkpoint))
    if (base := checkpoint.parent / BASE_MODEL).is_dir() and not (folder / BASE_MODEL).exists():
        copy_base_model(base, folder)
    return checkpoint_folder.step_path(manifest.step)
