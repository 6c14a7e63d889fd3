"""Weights out to Hugging Face's format, from a checkpoint or a live model, plain or sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from titan_config import from_dict
from torch import Tensor

from titan_ckpt.adapter import HFAdapter, Translation, asked, on_meta, translate
from titan_ckpt.chunks import is_dtensor
from titan_ckpt.errors import CheckpointError
from titan_ckpt.hf_files import write_folder
from titan_ckpt.manifest import check_whole
from titan_ckpt.ranks import Ranks
from titan_ckpt.reading import TensorReader, read_config

MAX_FILE_BYTES = 5 * 10**9


def save_hf(
    state: Mapping[str, Tensor],
    adapter: HFAdapter,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights of a live model, plain or sharded, as a folder that `transformers` loads.

    A collective of all ranks. Rank 0 writes, and holds one file's tensors at a time. Floating point numbers are rounded
    to `dtype` (None: as they are).

    Raises:
        CheckpointError: when the adapter refuses the state, or the folder is there already.
    """
    ranks = Ranks()

    def read(name: str) -> Tensor:
        tensor = state[name].detach()
        return (tensor.full_tensor() if is_dtensor(tensor) else tensor).cpu()

    ranks.together(lambda: _check_new(folder) if ranks.is_first else None)
    _write(on_meta(state), read, adapter, folder, dtype, max_file_bytes, ranks)


def export_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    adapter: HFAdapter | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the part "model" of a checkpoint as a folder that `transformers` loads, without the model.

    The adapter is that of the saved config, `config["model"].hf_adapter()`, unless one is given.

    Raises:
        BrokenCheckpoint: when the checkpoint is not whole.
        CheckpointError: when it has no model or no config, the adapter refuses it, or the folder is there already.
    """
    check_whole(checkpoint)
    _check_new(folder)
    if adapter is None:
        adapter = _saved_adapter(checkpoint)
    with TensorReader(checkpoint) as reader:
        prefix = "model."
        state = {
            name.removeprefix(prefix): torch.empty(stored.shape, dtype=stored.torch_dtype, device="meta")
            for name, stored in reader.index.items()
            if name.startswith(prefix)
        }
        _write(
            state, lambda name: reader.read(prefix + name), adapter, folder, dtype, max_file_bytes, Ranks(alone=True)
        )


def _write(
    state: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    adapter: HFAdapter,
    folder: Path,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    ranks: Ranks,
) -> None:
    translation = translate(adapter, state)
    computed = _computed(translation, state, read, adapter)

    def read_hf(key: str) -> Tensor:
        tensor = read(translation.renamed[key]) if key in translation.renamed else computed[key]
        return tensor.to(_rounded(tensor.dtype, dtype))

    types = {key: _rounded(tensor.dtype, dtype) for key, tensor in translation.hf_state.items()}
    sizes = {key: tensor.numel() * types[key].itemsize for key, tensor in translation.hf_state.items()}
    config = {**adapter.hf_config(), "dtype": str(max(types.values(), key=lambda t: t.itemsize)).removeprefix("torch.")}
    write_folder(folder, sizes, read_hf, config, max_file_bytes, ranks)


def _computed(
    translation: Translation, state: Mapping[str, Tensor], read: Callable[[str], Tensor], adapter: HFAdapter
) -> Mapping[str, Tensor]:
    """The values of the tensors that the adapter does not just rename."""
    keys = [key for key in translation.hf_state if key not in translation.renamed]
    if not keys:
        return {}
    unchanged = set(translation.renamed.values())
    values = asked(adapter.to_hf, {name: state[name] if name in unchanged else read(name) for name in state})
    if any(values[key].is_meta for key in keys):  # made of a tensor that is also renamed
        values = asked(adapter.to_hf, {name: read(name) for name in state})
    return {key: values[key] for key in keys}


def _rounded(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise CheckpointError(
            f"Got {folder} to export to, which is there already. An export is a new folder. Give another name."
        )


def _saved_adapter(checkpoint: Path) -> HFAdapter:
    config = read_config(checkpoint)
    if config is None:
        raise CheckpointError(
            f"Got {checkpoint}, which was saved without a config. The adapter is found through it. Give export_hf an "
            f"adapter."
        )
    return from_dict(config["model"]).hf_adapter()
