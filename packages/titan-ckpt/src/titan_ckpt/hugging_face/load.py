"""Weights from Hugging Face's format into a live model, plain or sharded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.format.chunks import Chunk, local_chunks
from titan_ckpt.format.finite import not_finite
from titan_ckpt.hugging_face.adapter import HFAdapter, WeightMapping, asked, check_complete, on_meta, parts_of
from titan_ckpt.hugging_face.folder_reader import HFReader

logger = logging.getLogger(__name__)

_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def load_hf(
    folder: Path, state: Mapping[str, Tensor], adapter: HFAdapter, elsewhere: Collection[str] = frozenset()
) -> None:
    """Fill the tensors of a live model, plain or sharded, from a folder of Hugging Face weights.

    One mapping after the other: beside the model there is never more than a mapping of it. Each rank reads only its own
    part of every tensor, as far as the adapter's mappings allow. Numbers may be widened (bfloat16 to float32), never
    rounded, but for those that were quantized. `config.json`, if there is one, and all names, shapes and types are
    checked before a weight is touched; weights that are not finite are logged. `folder` may be one file of it that says
    which of two sets of weights to take: an index, or a safetensors file. `elsewhere` names weights that other ranks
    have, of a model in pipeline stages.

    Raises:
        CheckpointError: naming what is missing, unexpected, of another shape, or of a type that would be rounded, and
            what `config.json` says of another model.
    """
    with HFReader(folder) as reader, torch.no_grad():
        stored = reader.stand_ins()
        mappings = asked(adapter.find, stored, reader.config)
        check_complete(mappings, state, elsewhere)
        _check_fit(folder, mappings, stored, on_meta(state), elsewhere)
        for mapping in mappings:
            if not mapping.own:
                asked(mapping.from_hf, reader.read(mapping))
        chunks = local_chunks(state)
        odd = [mapping.hf_names[0] for mapping in mappings if not _fill(mapping, chunks, reader)]
    if odd:
        logger.warning("Weights must be finite, got NaN or infinity in %s of %s.", listed(odd), folder)


def _fill(mapping: WeightMapping, chunks: Mapping[str, Chunk], reader: HFReader) -> bool:
    """Copy a mapping to where this rank holds something of it; return whether it is finite there.

    What this rank does not hold it does not read.
    """
    boxes = [_box(chunks.get(name), index) for name, index in mapping.own]
    if not any(boxes):
        return True
    filled = []
    for box, value in zip(boxes, asked(mapping.from_hf, reader.read(mapping)), strict=True):
        if box is not None:
            target, slices = box
            filled.append(target.copy_(value[slices]))
    return not mapping.hf_names or not not_finite({str(number): tensor for number, tensor in enumerate(filled)})


def _box(chunk: Chunk | None, index: int | None) -> tuple[Tensor, tuple[slice, ...]] | None:
    """This rank's part of a weight, or of a matrix of a stack of them, and where it is in the whole. None: nothing."""
    if chunk is None:
        return None
    if index is None:
        return chunk.data, chunk.slices
    begin = chunk.offsets[0]
    if not begin <= index < begin + len(chunk.data):
        return None
    return chunk.data[index - begin], chunk.slices[1:]


def _check_fit(
    folder: Path,
    mappings: Sequence[WeightMapping],
    stored: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    elsewhere: Collection[str],
) -> None:
    used = {key for mapping in mappings for key in mapping.hf_names}
    here = [mapping for mapping in mappings if mapping.own and not any(name in elsewhere for name, _ in mapping.own)]
    direct = {mapping.hf_names[0]: mapping for mapping in here if not mapping.is_quantized}
    expected = {key: mapping.to_hf(parts_of(mapping, state)) for key, mapping in direct.items() if key in stored}
    shapes = [
        f"{key} (there {list(stored[key].shape)}, here {list(tensor.shape)})"
        for key, tensor in expected.items()
        if stored[key].shape != tensor.shape
    ]
    rounded = [
        f"{key} (there {stored[key].dtype}, here {tensor.dtype})"
        for key, tensor in expected.items()
        if tensor.dtype not in (stored[key].dtype, *_WIDER.get(stored[key].dtype, ()))
    ]
    problems = {
        "missing": sorted(used - stored.keys()),
        "unexpected": sorted(stored.keys() - used),
        "of another shape": shapes,
        "of a type that would be rounded": rounded,
    }
    if any(problems.values()):
        lines = "\n".join(f"  {len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(
            f"Got {folder}, which does not fit the model. Its tensors must have the names and shapes that the adapter "
            f"expects, and nothing was loaded:\n{lines}\nGive the weights of this model, or the config of that one."
        )
