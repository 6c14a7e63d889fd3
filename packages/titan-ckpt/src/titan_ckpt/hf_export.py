"""Weights out to Hugging Face's format, from a checkpoint or a live model, plain or sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from titan_config import from_dict
from torch import Tensor

from titan_ckpt.adapter import HFAdapter, Piece, asked, check_complete, on_meta, parts_of
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
    tokenizer: Path | None = None,
) -> None:
    """Write the weights of a live model, plain or sharded, as a folder that `transformers` loads.

    A collective of all ranks. Rank 0 writes; beside the model there is never more than one piece of it. Floating point
    numbers are rounded to `dtype` (None: as they are), but for pieces that keep theirs. The tokenizer's files are
    copied from the folder `tokenizer` (None: there are none).

    Raises:
        CheckpointError: when the adapter refuses the state, or the folder is there already.
    """
    ranks = Ranks()

    def read(name: str) -> Tensor:
        tensor = state[name].detach()
        return (tensor.full_tensor() if is_dtensor(tensor) else tensor).cpu()

    ranks.together(lambda: _check_new(folder) if ranks.is_first else None)
    _write(on_meta(state), read, adapter, folder, dtype, max_file_bytes, ranks, tokenizer)


def export_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    adapter: HFAdapter | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer: Path | None = None,
) -> None:
    """Write the part "model" of a checkpoint as a folder that `transformers` loads, without the model.

    The adapter is that of the saved config, `config["model"].hf_adapter()`, unless one is given; the rest is as in
    `save_hf`.

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

        def read(name: str) -> Tensor:
            return reader.read(prefix + name)

        _write(state, read, adapter, folder, dtype, max_file_bytes, Ranks(alone=True), tokenizer)


def _write(
    state: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    adapter: HFAdapter,
    folder: Path,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    ranks: Ranks,
    tokenizer: Path | None,
) -> None:
    all_pieces = asked(adapter.pieces)
    check_complete(all_pieces, state)
    pieces = {piece.hf_names[0]: piece for piece in all_pieces if piece.hf_names}
    stand_ins = {
        key: tensor.to(_rounded(piece, tensor.dtype, dtype))
        for key, piece in pieces.items()
        for tensor in [asked(piece.to_hf, parts_of(piece, state))]
    }
    kept = _Kept(read)

    def read_hf(key: str) -> Tensor:
        own = kept.only({name for name, _ in pieces[key].own})
        return pieces[key].to_hf(parts_of(pieces[key], own)).to(stand_ins[key].dtype)

    weights = [tensor.dtype for key, tensor in stand_ins.items() if not pieces[key].keeps_dtype]
    widest = max(weights, key=lambda each: each.itemsize)
    config = {**adapter.hf_config(), "dtype": str(widest).removeprefix("torch.")}
    write_folder(folder, stand_ins, read_hf, config, max_file_bytes, ranks, tokenizer)


class _Kept:
    """Reads weights, and keeps those that the piece before needed too: the matrices of a stack come one by one."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._kept: dict[str, Tensor] = {}

    def only(self, names: set[str]) -> Mapping[str, Tensor]:
        self._kept = {name: tensor for name, tensor in self._kept.items() if name in names}
        for name in sorted(names - self._kept.keys()):
            self._kept[name] = self._read(name)
        return self._kept


def _rounded(piece: Piece, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point and not piece.keeps_dtype else dtype


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
