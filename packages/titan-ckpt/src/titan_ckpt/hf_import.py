"""Weights from Hugging Face's format into a live model, plain or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from titan_ckpt.adapter import HFAdapter, asked, translate
from titan_ckpt.chunks import is_dtensor, local_chunks
from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.hf_files import HFReader

_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def load_hf(folder: Path, state: Mapping[str, Tensor], adapter: HFAdapter) -> None:
    """Fill the tensors of a live model, plain or sharded, from a folder of Hugging Face weights.

    Each rank reads only its own part of every tensor that the adapter renames; tensors that it computes are read whole.
    Numbers may be widened (bfloat16 to float32), never rounded. All names, shapes and types are checked before a weight
    is touched.

    Raises:
        CheckpointError: naming what is missing, unexpected, of another shape, or of a type that would be rounded.
    """
    translation = translate(adapter, state)
    keys = {name: key for key, name in translation.renamed.items()}
    with HFReader(folder) as reader, torch.no_grad():
        _check_fit(folder, translation.hf_state, reader)
        _check_complete(folder, state, asked(adapter.from_hf, translation.hf_state))
        for name, chunk in local_chunks({name: state[name] for name in keys}).items():
            chunk.data.copy_(reader.read_box(keys[name], chunk.slices))
        computed = {name: tensor for name, tensor in state.items() if name not in keys}
        if computed:
            own = {key: state[name] for key, name in translation.renamed.items()}
            hf_state = {
                key: own[key] if key in own else reader.read(key).to(expected.dtype)  # widened, as was checked
                for key, expected in translation.hf_state.items()
            }
            _copy(asked(adapter.from_hf, hf_state), computed)


def _copy(values: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, chunk in local_chunks(state).items():
        value = values[name]
        if is_dtensor(value):
            state[name].copy_(value)
        else:
            chunk.data.copy_(value[chunk.slices])


def _is_repeat(key: str, reader: HFReader, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether a tensor that nobody expects only repeats one that is, as tied weights do."""
    alike = [other for other in expected if other in stored and stored[other].shape == stored[key].shape]
    return any(torch.equal(reader.read(key), reader.read(other)) for other in alike)


def _check_fit(folder: Path, expected: Mapping[str, Tensor], reader: HFReader) -> None:
    stored = reader.stand_ins()
    extra = [key for key in stored if key not in expected and not _is_repeat(key, reader, stored, expected)]
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
        if expected[key].dtype not in (stored[key].dtype, *_WIDER.get(stored[key].dtype, ()))
    ]
    problems = {
        "missing": missing,
        "unexpected": extra,
        "of another shape": shapes,
        "of a type that would be rounded": rounded,
    }
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
