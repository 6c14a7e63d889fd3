"""Weights out to Hugging Face's format, from a checkpoint or a live model, plain or sharded."""

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
from titan_ckpt.hugging_face.adapter import HFAdapter, WeightMapping, asked, check_complete, on_meta, parts_of
from titan_ckpt.hugging_face.base_folder import BASE_MODEL
from titan_ckpt.hugging_face.folder_writer import write_folder
from titan_ckpt.hugging_face.metadata import Companions, companions, ids_of_saved
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
    """Write the weights of a live model, plain or sharded, as a folder that `transformers` loads.

    A collective of all ranks. Rank 0 writes; beside the model there is never more than one mapping of it. Floating point
    numbers are rounded to `dtype` (None: as they are), but for mappings that keep theirs.

    `base_model` is the Hugging Face folder that the model began with (None: there is none): what training does not
    change is that of its `config.json` (ids of tokens, settings of no layer), its `generation_config.json` and its
    tokenizer. The tokenizer's files are copied from the folder `tokenizer` instead, if that is given.

    Raises:
        CheckpointError: when the adapter refuses the state, the folder is there already, or what is copied is not.
    """
    ranks = CollectiveGuard()

    def read(name: str) -> Tensor:
        tensor = state[name].detach()
        return (tensor.full_tensor() if is_dtensor(tensor) else tensor).cpu()

    ranks.together(lambda: _check_new(folder) if ranks.is_first else None)
    beside = partial(companions, base=base_model, tokenizer=tokenizer, run_ids=dict)
    _write(on_meta(state), read, adapter, folder, dtype, max_file_bytes, ranks, beside)


def export_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    adapter: HFAdapter | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer: Path | None = None,
    base_model: Path | None = None,
) -> None:
    """Write the part "model" of a checkpoint as a folder that `transformers` loads, without the model.

    The adapter is that of the saved config, `config["model"].hf_adapter()`, unless one is given. The base model is the
    one that the run began with (its copy beside the checkpoints, or `initial_load_path`), unless one is given; for a
    run that began without, ids of tokens are those of its tokenizer, `config["tokenizer"].build()`. The rest is as in
    `save_hf`.

    Raises:
        BrokenCheckpoint: when the checkpoint is not whole.
        CheckpointError: when it has no model or no config, the adapter refuses it, the folder is there already, or the
            base model or the tokenizer of the run is gone.
    """
    check_whole(checkpoint)
    config = read_config(checkpoint)
    if adapter is None:
        adapter = _saved_adapter(checkpoint, config)
    if base_model is None:
        base_model = _saved_base(checkpoint, config)
    beside = partial(companions, base=base_model, tokenizer=tokenizer, run_ids=partial(ids_of_saved, config))
    export_checkpoint(checkpoint, folder, dtype, adapter, beside, max_file_bytes)


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None,
    adapter: HFAdapter,
    beside: Callable[[Mapping[str, Any]], Companions],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model of a checkpoint that was found whole; `beside` makes what goes with its `config.json`."""
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

        _write(state, read, adapter, folder, dtype, max_file_bytes, CollectiveGuard(alone=True), beside)


def _write(
    state: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    adapter: HFAdapter,
    folder: Path,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    ranks: CollectiveGuard,
    beside: Callable[[Mapping[str, Any]], Companions],
) -> None:
    all_pieces = asked(adapter.mappings)
    check_complete(all_pieces, state)
    mappings = {mapping.hf_names[0]: mapping for mapping in all_pieces if mapping.hf_names}
    stand_ins = {
        key: tensor.to(_rounded(mapping, tensor.dtype, dtype))
        for key, mapping in mappings.items()
        for tensor in [asked(mapping.to_hf, parts_of(mapping, state))]
    }
    kept = _Kept(read)

    def read_hf(key: str) -> Tensor:
        own = kept.only({name for name, _ in mappings[key].own})
        return mappings[key].to_hf(parts_of(mappings[key], own)).to(stand_ins[key].dtype)

    weights = [tensor.dtype for key, tensor in stand_ins.items() if not mappings[key].keeps_dtype]
    floats = (each for each in weights if each.is_floating_point)
    widest = max(floats, key=lambda each: each.itemsize, default=torch.float32)
    config = {**adapter.hf_config(), "dtype": str(widest).removeprefix("torch.")}
    made = ranks.together(lambda: beside(config) if ranks.is_first else None)
    write_folder(folder, stand_ins, read_hf, made, max_file_bytes, ranks)


class _Kept:
    """Reads weights, and keeps those that the mapping before needed too: the matrices of a stack come one by one."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._kept: dict[str, Tensor] = {}

    def only(self, names: set[str]) -> Mapping[str, Tensor]:
        self._kept = {name: tensor for name, tensor in self._kept.items() if name in names}
        for name in sorted(names - self._kept.keys()):
            self._kept[name] = self._read(name)
        return self._kept


def _rounded(mapping: WeightMapping, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point and not mapping.keeps_dtype else dtype


def _check_new(folder: Path) -> None:
    local_path(folder, "The folder to export to")
    if folder.exists():
        raise CheckpointError(
            f"Got {folder} to export to, which is there already. An export is a new folder. Give another name."
        )


def _saved_adapter(checkpoint: Path, config: Any) -> HFAdapter:
    if config is None:
        raise CheckpointError(
            f"Got {checkpoint}, which was saved without a config. The adapter is found through it. Give export_hf an "
            f"adapter."
        )
    try:
        return from_dict(config["model"]).hf_adapter()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The config of {checkpoint} must name a model that has an adapter, got {error!s:.600} Give export_hf an "
            f"adapter."
        ) from error


def _saved_base(checkpoint: Path, config: Any) -> Path | None:
    """The base model of the run: as it was copied beside the checkpoints, or where the run found it."""
    if (kept := checkpoint.parent / BASE_MODEL).is_dir():
        return kept
    settings = config.get("checkpoint") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or settings.get("initial_load_in_hf") is not True:
        return None
    path = settings.get("initial_load_path")
    folder = Path(path["$path"]) if isinstance(path, dict) and isinstance(path.get("$path"), str) else None
    if folder is None or not folder.exists():
        raise CheckpointError(
            f"The base model of the run must be there for its token ids and generation settings, got neither {kept} "
            f"nor {folder}. Give --base-model (base_model=) with that folder."
        )
    return folder
