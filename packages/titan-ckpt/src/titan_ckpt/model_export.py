"""The model of a checkpoint alone, without optimizer and data: a third of the size, to begin other runs with."""

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
from titan_ckpt.hugging_face.base_folder import BASE_MODEL, keep_base_model
from titan_ckpt.save.save import Snapshot, save
from titan_ckpt.save.write_plan import make_plan


def export_model(checkpoint: Path, folder: Path) -> Path:
    """Write the part "model" of a checkpoint as a checkpoint of its own below `folder`; return where it is.

    Another run begins with it through `initial_load_path`. What exports to Hugging Face keep of the base model goes
    with it.

    Raises:
        BrokenCheckpoint: when the checkpoint is not whole.
        CheckpointError: when it has no model, or `folder` has a checkpoint of that step.
    """
    manifest = check_whole(checkpoint)
    values = read_values(checkpoint)
    if "model" not in values:
        raise CheckpointError(
            f'Got {checkpoint}, which has the parts {list(values)}. What is exported is the part "model". Give a '
            f"checkpoint that has one."
        )
    with TensorReader(checkpoint) as reader:
        names = [name for name in reader.index if name.startswith("model.")]
        tensors = {name: reader.read(name) for name in names}
    chunks = [Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()]
    checkpoint_folder = CheckpointFolder(folder)
    ranks = CollectiveGuard(alone=True)
    write = partial(write_tensors, tensors={chunk.key: chunk.data for chunk in chunks})
    snapshot = Snapshot(manifest.step, make_plan(chunks, frozenset(), ranks), write, {"model": values["model"]})
    save(snapshot, checkpoint_folder, ranks, read_config(checkpoint))
    if (base := checkpoint.parent / BASE_MODEL).is_dir() and not (folder / BASE_MODEL).exists():
        keep_base_model(base, folder)
    return checkpoint_folder.path(manifest.step)
