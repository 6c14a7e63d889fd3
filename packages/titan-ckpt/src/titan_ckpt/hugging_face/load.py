"""Import of weights in Hugging Face format into a live model, plain or sharded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError, join_names
from titan_ckpt.format.chunks import Chunk, local_chunks
from titan_ckpt.format.finite import find_nonfinite
from titan_ckpt.hugging_face.adapter import (
    HFAdapter,
    WeightMapping,
    call_adapter,
    check_complete,
    select_weights,
    to_meta,
)
from titan_ckpt.hugging_face.folder_reader import HFReader

logger = logging.getLogger(__name__)

_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def load_hf(
    folder: Path, state: Mapping[str, Tensor], adapter: HFAdapter, nonlocal_weights: Collection[str] = frozenset()
) -> None:
    """Load a folder of Hugging Face weights into the tensors of a live model, plain or sharded.

    Mappings are loaded one after the other: only one at a time needs memory in addition to the model. Each rank reads
    only its own chunk of every tensor, as far as the mappings of the adapter allow. Values may be widened (bfloat16 to
    float32) but are never rounded, except for quantized weights. `config.json`, if present, and all names, shapes and
    dtypes are checked before any weight changes; NaN and infinite weights are logged.

    `folder` may also be a file that selects one of two sets of weights: an index, or a safetensors file.
    `nonlocal_weights` names the weights that other ranks hold, in a model split into pipeline stages.

    Raises:
        CheckpointError: if a tensor is missing, unexpected, of another shape, or of a dtype that would be rounded, or
            if `config.json` describes another model; the message names the differences.
    """
    with HFReader(folder) as reader, torch.no_grad():
        stored = reader.meta_tensors()
        mappings = call_adapter(adapter.find, stored, reader.config)
        check_complete(mappings, state, nonlocal_weights)
        _check_compatibility(folder, mappings, stored, to_meta(state), nonlocal_weights)
        for mapping in mappings:
            if not mapping.own:
                call_adapter(mapping.from_hf, reader.read(mapping))
        chunks = local_chunks(state)
        nonfinite = [mapping.hf_names[0] for mapping in mappings if not _fill(mapping, chunks, reader)]
    if nonfinite:
        logger.warning("Weights must be finite, got NaN or infinity in %s of %s.", join_names(nonfinite), folder)


def _fill(mapping: WeightMapping, chunks: Mapping[str, Chunk], reader: HFReader) -> bool:
    """Copy the local values of a mapping into the chunks of this rank; return whether they are finite.

    Mappings without local values are not read.
    """
    boxes = [_box(chunks.get(name), index) for name, index in mapping.own]
    if not any(boxes):
        return True
    filled = []
    for box, value in zip(boxes, call_adapter(mapping.from_hf, reader.read(mapping)), strict=True):
        if box is not None:
            target, slices = box
            filled.append(target.copy_(value[slices]))
    return not mapping.hf_names or not find_nonfinite({str(number): tensor for number, tensor in enumerate(filled)})


def _box(chunk: Chunk | None, index: int | None) -> tuple[Tensor, tuple[slice, ...]] | None:
    """Return this rank's chunk of a weight, or of one matrix of a stack, and its slices; None if it has none."""
    if chunk is None:
        return None
    if index is None:
        return chunk.data, chunk.slices
    begin = chunk.offsets[0]
    if not begin <= index < begin + len(chunk.data):
        return None
    return chunk.data[index - begin], chunk.slices[1:]


def _check_compatibility(
    folder: Path,
    mappings: Sequence[WeightMapping],
    stored: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    nonlocal_weights: Collection[str],
) -> None:
    used = {key for mapping in mappings for key in mapping.hf_names}
    local = [
        mapping for mapping in mappings if mapping.own and not any(name in nonlocal_weights for name, _ in mapping.own)
    ]
    direct = {mapping.hf_names[0]: mapping for mapping in local if not mapping.is_quantized}
    expected = {key: mapping.to_hf(select_weights(mapping, state)) for key, mapping in direct.items() if key in stored}
    shapes = [
        f"{key} (stored {list(stored[key].shape)}, here {list(tensor.shape)})"
        for key, tensor in expected.items()
        if stored[key].shape != tensor.shape
    ]
    rounded = [
        f"{key} (stored {stored[key].dtype}, here {tensor.dtype})"
        for key, tensor in expected.items()
        if tensor.dtype not in (stored[key].dtype, *_WIDER.get(stored[key].dtype, ()))
    ]
    problems = {
        "missing": sorted(used - stored.keys()),
        "unexpected": sorted(stored.keys() - used),
        "of another shape": shapes,
        "of a dtype that would be rounded": rounded,
    }
    if any(problems.values()):
        lines = "\n".join(f"  {len(names)} {kind}: {join_names(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(
            f"The tensors of {folder} must have the names, shapes and dtypes that the adapter expects, got:\n{lines}\n"
            f"Nothing was loaded. Use the weights of this model, or the config of that one."
        )
