"""Export of weights to Hugging Face format, from a checkpoint or from a live model, plain or sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from titan_config import from_dict
from torch import Tensor

from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.chunks import is_dtensor
from titan_ckpt.format.readers import TensorReader, read_config
from titan_ckpt.format.verify import check_whole
from titan_ckpt.hugging_face.adapter import (
    HFAdapter,
    WeightMapping,
    call_adapter,
    check_complete,
    select_weights,
    to_meta,
)
from titan_ckpt.hugging_face.base_folder import BASE_MODEL
from titan_ckpt.hugging_face.folder_writer import write_folder
from titan_ckpt.hugging_face.metadata import ExportMetadata, export_metadata, token_ids_of_saved_config
from titan_ckpt.paths import local_path

MAX_FILE_BYTES = 5 * 10**9


def save_hf(
    state: Mapping[str, Tensor],
    adapter: HFAdapter,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer: Path | None = None,
    base_model: Path | None = None,
) -> None:
    """Write the weights of a live model, plain or sharded, to a new folder that `transformers` can load.

    A collective of all ranks. Rank 0 writes; only one mapping at a time needs memory in addition to the model.
    Floating-point weights are rounded to `dtype` (None: keep their dtypes), except for mappings with `keeps_dtype`. A
    file has at most `max_file_bytes` bytes of tensors, or one larger tensor.

    `base_model` is the Hugging Face folder that the model was initialized from (None: there is none). It provides what
    training does not change: the token ids and the other non-architecture settings of its `config.json`, its
    `generation_config.json`, and its tokenizer. `tokenizer` is a folder to copy the tokenizer files from instead.

    Raises:
        CheckpointError: if the adapter rejects the state, `folder` exists, or a folder or file to copy from is missing.
    """
    guard = CollectiveGuard()

    def read(name: str) -> Tensor:
        tensor = state[name].detach()
        return (tensor.full_tensor() if is_dtensor(tensor) else tensor).cpu()

    guard.run_on_all(lambda: _check_new(folder) if guard.is_first else None)
    build_metadata = partial(export_metadata, base=base_model, tokenizer=tokenizer, run_ids=dict)
    _write(to_meta(state), read, adapter, folder, dtype, max_file_bytes, guard, build_metadata)


def export_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    adapter: HFAdapter | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer: Path | None = None,
    base_model: Path | None = None,
) -> None:
    """Export the part "model" of a checkpoint to a new folder that `transformers` can load, without building the model.

    `adapter` defaults to that of the saved config, `config["model"].hf_adapter()`. `base_model` defaults to the one
    that initialized the run (its copy beside the checkpoints, or `initial_load_path`); if there was none, the token ids
    are those of the run's tokenizer, `config["tokenizer"].build()`. The other arguments are those of `save_hf`.

    Raises:
        BrokenCheckpoint: if the checkpoint is not valid.
        CheckpointError: if it has no model or no config, the adapter rejects it, `folder` exists, or the base model or
            the tokenizer of the run is missing.
    """
    check_whole(checkpoint)
    config = read_config(checkpoint)
    if adapter is None:
        adapter = _saved_adapter(checkpoint, config)
    if base_model is None:
        base_model = _saved_base(checkpoint, config)
    build_metadata = partial(
        export_metadata, base=base_model, tokenizer=tokenizer, run_ids=partial(token_ids_of_saved_config, config)
    )
    export_checkpoint(checkpoint, folder, dtype, adapter, build_metadata, max_file_bytes)


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None,
    adapter: HFAdapter,
    build_metadata: Callable[[Mapping[str, Any]], ExportMetadata],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Export the model of a verified checkpoint; `build_metadata` returns the other files for its `config.json`."""
    _check_new(folder)
    with TensorReader(checkpoint) as reader:
        prefix = "model."
        state = {
            name.removeprefix(prefix): torch.empty(stored.shape, dtype=stored.torch_dtype, device="meta")
            for name, stored in reader.index.items()
            if name.startswith(prefix)
        }

        def read(name: str) -> Tensor:
            return reader.read(prefix + name)

        _write(state, read, adapter, folder, dtype, max_file_bytes, CollectiveGuard(alone=True), build_metadata)


def _write(
    state: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    adapter: HFAdapter,
    folder: Path,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    guard: CollectiveGuard,
    build_metadata: Callable[[Mapping[str, Any]], ExportMetadata],
) -> None:
    all_mappings = call_adapter(adapter.mappings)
    check_complete(all_mappings, state)
    mappings = {mapping.hf_names[0]: mapping for mapping in all_mappings if mapping.hf_names}
    meta_tensors = {
        key: tensor.to(_rounded(mapping, tensor.dtype, dtype))
        for key, mapping in mappings.items()
        for tensor in [call_adapter(mapping.to_hf, select_weights(mapping, state))]
    }
    cache = _WeightCache(read)

    def read_hf(key: str) -> Tensor:
        weights = cache.get({name for name, _ in mappings[key].own})
        return mappings[key].to_hf(select_weights(mappings[key], weights)).to(meta_tensors[key].dtype)

    dtypes = [tensor.dtype for key, tensor in meta_tensors.items() if not mappings[key].keeps_dtype]
    floats = (each for each in dtypes if each.is_floating_point)
    widest = max(floats, key=lambda each: each.itemsize, default=torch.float32)
    config = {**adapter.hf_config(), "dtype": str(widest).removeprefix("torch.")}
    metadata = guard.run_on_all(lambda: build_metadata(config) if guard.is_first else None)
    write_folder(folder, meta_tensors, read_hf, metadata, max_file_bytes, guard)


class _WeightCache:
    """Reads weights, and caches those that the previous mapping needed: matrices of a stack are exported one by one."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._cached: dict[str, Tensor] = {}

    def get(self, names: set[str]) -> Mapping[str, Tensor]:
        self._cached = {name: tensor for name, tensor in self._cached.items() if name in names}
        for name in sorted(names - self._cached.keys()):
            self._cached[name] = self._read(name)
        return self._cached


def _rounded(mapping: WeightMapping, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point and not mapping.keeps_dtype else dtype


def _check_new(folder: Path) -> None:
    local_path(folder, "The export folder")
    if folder.exists():
        raise CheckpointError(f"The export folder must not exist, got {folder}.")


def _saved_adapter(checkpoint: Path, config: Any) -> HFAdapter:
    if config is None:
        raise CheckpointError(
            f"{checkpoint} must contain a config with the model's adapter, got none. Pass adapter= to export_hf."
        )
    try:
        return from_dict(config["model"]).hf_adapter()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The config of {checkpoint} must contain a model with an adapter, got {error!s:.600} Pass adapter= to "
            "export_hf."
        ) from error


def _saved_base(checkpoint: Path, config: Any) -> Path | None:
    """Return the base model of the run: its copy beside the checkpoints, or the folder that initialized the run."""
    if (copied := checkpoint.parent / BASE_MODEL).is_dir():
        return copied
    settings = config.get("checkpoint") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or settings.get("initial_load_in_hf") is not True:
        return None
    path = settings.get("initial_load_path")
    folder = Path(path["$path"]) if isinstance(path, dict) and isinstance(path.get("$path"), str) else None
    if folder is None or not folder.exists():
        raise CheckpointError(
            f"The base model of the run must exist for its token ids and generation settings, got neither {copied} nor "
            f"{folder}. Set --base-model (base_model=) to that folder."
        )
    return folder
