"""What an export keeps of the base model, the Hugging Face folder that a run began with: what training does not change.

The small files of that folder are copied beside the checkpoints when a run begins, since the folder may be gone later.
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
from titan_ckpt.format.strict_json import is_there, read_json

BASE_MODEL = "base-model"
"""Name of the folder beside the checkpoints."""

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
    *("tokenizer.model.v*", "additional_chat_templates/*.jinja"),
)
"""What Hugging Face calls the files of a tokenizer, in patterns."""

_TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_BLOCK = 1 << 24

_NOT_TRAINED = (
    *("attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "use_cache"),
)
"""Settings that a model of ours does not have, and writes as constants."""

_OF_FILES = ("auto_map", "dtype", "quantization_config", "rope_scaling", "rope_theta", "torch_dtype")
"""Settings of the base model's own files and code, or written in another way (`rope_parameters`) by an adapter."""

_OF_THE_MODEL = ("hidden_size", "num_hidden_layers")


def tokenizer_in(folder: Path) -> list[str]:
    """The names of a tokenizer's files in a folder."""
    return _names_in(folder, TOKENIZER_FILES)


def terms_in(folder: Path) -> list[str]:
    """The names of the license's files in a folder."""
    return _names_in(folder, _TERMS)


def keep_base_model(source: Path, checkpoints: Path) -> None:
    """Copy what an export keeps of the folder `source` to the folder of the checkpoints, in place of an older copy.

    Raises:
        CheckpointError: when one of the files is no JSON, or is a link to a file of another folder.
    """
    names = [*tokenizer_in(source), *terms_in(source)]
    for name in (CONFIG, GENERATION):
        if is_there(source / name):
            read_json(source / name)
            names.append(name)
    for left in checkpoints.glob(f"{BASE_MODEL}.saving-*"):  # by a process that was killed
        shutil.rmtree(left)
    temporary = checkpoints / f"{BASE_MODEL}.saving-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        for name in names:
            copy_file(source, name, temporary)
        forget_base_model(checkpoints)
        publish(temporary, checkpoints / BASE_MODEL)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def forget_base_model(checkpoints: Path) -> None:
    """Delete the copy that an earlier run left beside its checkpoints."""
    if (checkpoints / BASE_MODEL).is_dir():
        shutil.rmtree(checkpoints / BASE_MODEL)


def copy_file(source: Path, name: str, folder: Path) -> None:
    """Copy a file of the folder `source`.

    Raises:
        CheckpointError: when it is a link to a file of another folder, but for the `blobs` of the hub's cache.
    """
    root, real = source.resolve(), (source / name).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.parent == blobs):
        raise CheckpointError(
            f"{source / name} must be a file of its own folder or of the hub's cache, got a link to {real}. Copy the "
            f"file there."
        )
    (folder / name).parent.mkdir(exist_ok=True)
    with real.open("rb") as file:
        write_blocks(folder / name, iter(lambda: file.read(_BLOCK), b""))


def merge_config(own: Mapping[str, Any], base: Path | None, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a trained model: that of its adapter, with what the base model's says besides.

    Ids of tokens are the base model's; without one they are `token_ids`, as far as the adapter says nothing.

    Raises:
        CheckpointError: when the base model is another model.
    """
    if base is None or not is_there(base / CONFIG):
        return {**own, **{key: value for key, value in token_ids.items() if own.get(key) is None}}
    whole = read_json(base / CONFIG)
    parts = [part for part in (whole, *whole.values()) if isinstance(part, dict)]
    same = [part for part in parts if part.get("model_type") == own.get("model_type")]
    kept = same[0] if same else {}
    ids = {key: value for part in (whole, kept) for key, value in part.items() if _is_token_id(key, value)}
    if other := [f"{key} {kept[key]!r:.40}" for key in _OF_THE_MODEL if key in kept and kept[key] != own.get(key)]:
        raise CheckpointError(
            f"The base model must be the one that the run began with, got {base} with {' and '.join(other)}."
        )
    merged = {key: value for key, value in kept.items() if key not in _OF_FILES} | dict(own)
    merged |= {key: kept[key] for key in _NOT_TRAINED if key in kept and key in own}
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
