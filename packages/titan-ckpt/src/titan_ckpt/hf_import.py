"""Weights from Hugging Face's format into a live model, plain or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_ckpt.adapter import HFAdapter, asked, translate
from titan_ckpt.chunks import local_chunks
from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.hf_files import HFReader


def load_hf(folder: Path, state: Mapping[str, Tensor], adapter: HFAdapter) -> None:
    """Fill the tensors of a live model, plain or sharded, from a folder of Hugging Face weights.

    Each rank reads only its own part of every tensor that the adapter renames; tensors that it computes are read whole.
    Numbers may be widened (bfloat16 to float32), never rounded. All names, shapes and types are checked before a weight
    is touched.

    Raises:
        CheckpointError: naming what is missing, unexpected, of another shape, or of a type that would be rounded.
    """
    translation = translate(adapter, state)
    with HFReader(folder) as reader, torch.no_grad():
        stored = reader.stand_ins()
        _check_fit(folder, translation.hf_state, stored)
        if set(stored) != set(translation.hf_state):  # repeated weights: the adapter judges them by their values
            _fill_computed(state, asked(adapter.from_hf, {key: reader.read(key) for key in stored}))
            return
        _check_complete(folder, state, asked(adapter.from_hf, translation.hf_state))
        renamed = {name: key for key, name in translation.renamed.items()}
        for name, chunk in local_chunks({name: state[name] for name in renamed}).items():
            chunk.data.copy_(reader.read_box(renamed[name], chunk.slices))
        if set(state) - set(renamed):
            mixed = {k: state[translation.renamed[k]] if k in translation.renamed else reader.read(k) for k in stored}
            computed = asked(adapter.from_hf, mixed)
            _fill_computed({name: state[name] for name in state if name not in renamed}, computed)


def _fill_computed(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, chunk in local_chunks(state).items():
        value = values[name]
        if isinstance(value, DTensor):
            state[name].copy_(value)
        else:
            chunk.data.copy_(value[chunk.slices])


def _check_fit(folder: Path, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in stored]
    both = [key for key in expected if key in stored]
    shapes = [
        f"{key} (there {list(stored[key].shape)}, here {list(expected[key].shape)})"
        for key in both
        if stored[key].shape != expected[key].shape
    ]
    rounded = [
        f"{key} (there {stored[key].dtype}, here {expected[key].dtype})"
        for key in both
        if torch.promote_types(stored[key].dtype, expected[key].dtype) != expected[key].dtype
    ]
    problems = {"missing": missing, "of another shape": shapes, "of a type that would be rounded": rounded}
    if any(problems.values()):
        lines = "\n".join(f"  {len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(
            f"Got {folder}, which does not fit the model. Its tensors must have the names and shapes that the adapter "
            f"expects, and nothing was loaded:\n{lines}\nGive the weights of this model, or the config of that one."
        )


def _check_complete(folder: Path, state: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> None:
    wrong = sorted(set(state) ^ set(converted))
    wrong += [name for name in state if name in converted and converted[name].shape != state[name].shape]
    if wrong:
        raise CheckpointError(
            f"Got an adapter that makes other tensors of {folder} than the model has. It must be a bijection: "
            f"{listed(wrong)} are missing, unexpected or of another shape. Correct the adapter."
        )
