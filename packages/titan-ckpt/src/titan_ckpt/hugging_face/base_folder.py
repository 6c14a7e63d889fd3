"""The base model: the Hugging Face folder that initialized a run. Exports take from it what training does not change.

Its small files are copied beside the checkpoints at the start of a run, since the folder may be gone later.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.durable_files import publish, write_blocks
from titan_ckpt.format.strict_json import read_json, regular_file_exists

BASE_MODEL = "base-model"
"""Name of the copy, beside the checkpoints."""

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
    *("tokenizer.model.v*", "additional_chat_templates/*.jinja"),
)
"""File names of a Hugging Face tokenizer, as glob patterns."""

_LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_BLOCK = 1 << 24

_CONSTANT_SETTINGS = (
    *("attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "use_cache"),
)
"""Settings that our models lack; their adapters write constants for them."""

_FILE_SETTINGS = ("auto_map", "dtype", "quantization_config", "rope_scaling", "rope_theta", "torch_dtype")
"""Settings of the base model's own files and code, or written in another form (`rope_parameters`) by adapters."""

_SIZE_SETTINGS = ("hidden_size", "num_hidden_layers")


def tokenizer_files_in(folder: Path) -> list[str]:
    """Return the names of the tokenizer files in a folder."""
    return _names_in(folder, TOKENIZER_FILES)


def license_files_in(folder: Path) -> list[str]:
    """Return the names of the license files in a folder."""
    return _names_in(folder, _LICENSE_FILES)


def copy_base_model(source: Path, checkpoints: Path) -> None:
    """Copy the files that exports need from the folder `source` to the checkpoint folder, replacing an older copy.

    Raises:
        CheckpointError: if a file is not valid JSON, or is a link out of its folder.
    """
    names = [*tokenizer_files_in(source), *license_files_in(source)]
    for name in (CONFIG, GENERATION):
        if regular_file_exists(source / name):
            read_json(source / name)
            names.append(name)
    for leftover in checkpoints.glob(f"{BASE_MODEL}.saving-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    temporary = checkpoints / f"{BASE_MODEL}.saving-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        for name in names:
            copy_file(source, name, temporary)
        delete_base_model(checkpoints)
        publish(temporary, checkpoints / BASE_MODEL)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_base_model(checkpoints: Path) -> None:
    """Delete the copy that an earlier run left beside its checkpoints."""
    if (checkpoints / BASE_MODEL).is_dir():
        shutil.rmtree(checkpoints / BASE_MODEL)


def copy_file(source: Path, name: str, folder: Path) -> None:
    """Copy the file `name` of the folder `source` to `folder`.

    Raises:
        CheckpointError: if it is a link out of `source`, except to the `blobs` folder of the Hugging Face cache.
    """
    root, real = source.resolve(), (source / name).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.parent == blobs):
        raise CheckpointError(
            f"{source / name} must be a file in its folder or in the Hugging Face cache, got a link to {real}. Copy "
            "the file into the folder."
        )
    (folder / name).parent.mkdir(exist_ok=True)
    with real.open("rb") as file:
        write_blocks(folder / name, iter(lambda: file.read(_BLOCK), b""))


def merge_config(own: Mapping[str, Any], base: Path | None, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a trained model: `own`, from its adapter, merged with that of the base model.

    Token ids are those of the base model. Without a base model, `token_ids` fill in the ids that `own` lacks.

    Raises:
        CheckpointError: if the base model has other sizes than `own`.
    """
    if base is None or not regular_file_exists(base / CONFIG):
        return {**own, **{key: value for key, value in token_ids.items() if own.get(key) is None}}
    whole = read_json(base / CONFIG)
    parts = [part for part in (whole, *whole.values()) if isinstance(part, dict)]
    same = [part for part in parts if part.get("model_type") == own.get("model_type")]
    kept = same[0] if same else {}
    ids = {key: value for part in (whole, kept) for key, value in part.items() if _is_token_id(key, value)}
    if other := [f"{key} {kept[key]!r:.40}" for key in _SIZE_SETTINGS if key in kept and kept[key] != own.get(key)]:
        raise CheckpointError(
            f"The base model must be the one that initialized the run, got {base} with {' and '.join(other)}."
        )
    merged = {key: value for key, value in kept.items() if key not in _FILE_SETTINGS} | dict(own)
    merged |= {key: kept[key] for key in _CONSTANT_SETTINGS if key in kept and key in own}
    merged |= ids
    lengths = [part.get("max_position_embeddings") for part in (own, kept)]
    if known := [length for length in lengths if isinstance(length, int)]:
        merged["max_position_embeddings"] = max(known)
    return merged


def _is_token_id(key: str, value: Any) -> bool:
    return key.endswith("_token_id") and value is not None


def _names_in(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(name for name in found if os.path.isfile(folder / name))
