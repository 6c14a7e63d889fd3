"""A folder of safetensors files as Hugging Face lays it out, as it is written."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_ckpt.errors import CheckpointError
from titan_ckpt.files import publish, write_blocks, write_json
from titan_ckpt.hf_reader import CONFIG, INDEX
from titan_ckpt.ranks import Ranks
from titan_ckpt.tensor_file import read_through, write_streamed

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""What Hugging Face calls the files of a tokenizer."""


def write_folder(
    folder: Path,
    stand_ins: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
    max_file_bytes: int,
    ranks: Ranks,
    tokenizer: Path | None,
) -> None:
    """Write tensors as `model-00001-of-00002.safetensors` and so on, with their index and what else a model has there.

    Every rank calls `read(key)` once for each key of `stand_ins`, in the same order; rank 0 writes one after the other.
    The folder gets its name when it is complete.
    """

    def write(action: Callable[[], Any]) -> None:
        ranks.together(lambda: action() if ranks.is_first else None)

    temporary = folder.with_name(f"{folder.name}.saving-{uuid.uuid4().hex[:8]}")
    write(lambda: temporary.mkdir(parents=True))
    groups = _groups(stand_ins, max_file_bytes)
    weight_map: dict[str, str] = {}
    for place, keys in enumerate(groups, start=1):
        name = f"model-{place:05}-of-{len(groups):05}.safetensors"
        weight_map.update(dict.fromkeys(keys, name))
        tensors = {key: stand_ins[key] for key in keys}
        write_or_read = partial(write_streamed, temporary / name) if ranks.is_first else read_through
        ranks.together(partial(write_or_read, tensors, read))
    total = sum(tensor.nbytes for tensor in stand_ins.values())
    write(lambda: write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}))
    write(lambda: write_json(temporary / CONFIG, dict(config)))
    write(lambda: _write_generation(temporary, config))
    if tokenizer is not None:
        write(lambda: _copy_tokenizer(tokenizer, temporary))
    write(lambda: publish(temporary, folder))


def _write_generation(folder: Path, config: Mapping[str, Any]) -> None:
    """What `generate` of transformers begins with: the tokens that begin and end a text, where the model has them."""
    tokens = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
    }
    if tokens:
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def tokenizer_in(folder: Path) -> list[str]:
    """The names of a tokenizer's files in a folder."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _copy_tokenizer(source: Path, folder: Path) -> None:
    names = tokenizer_in(source)
    if not names:
        raise CheckpointError(
            f"Got {source}, which has no tokenizer. It is a folder with tokenizer.json, or another of "
            f"{', '.join(TOKENIZER_FILES)}. Give the folder that a model was downloaded to, or none."
        )
    for name in names:
        write_blocks(folder / name, [(source / name).read_bytes()])


def _groups(stand_ins: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for key, tensor in stand_ins.items():
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += tensor.nbytes
    return groups
