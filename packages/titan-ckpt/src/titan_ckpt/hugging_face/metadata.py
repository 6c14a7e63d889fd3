"""The files of an export besides its weights: `config.json`, generation settings, tokenizer, license."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titan_config import from_dict

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.durable_files import write_json
from titan_ckpt.format.strict_json import read_json, regular_file_exists
from titan_ckpt.hugging_face.base_folder import (
    CONFIG,
    GENERATION,
    TOKENIZER_FILES,
    copy_file,
    license_files_in,
    merge_config,
    tokenizer_files_in,
)
from titan_ckpt.hugging_face.weight_files import folder_of

_TOKEN_IDS = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}


class Tokenizer(Protocol):
    """The attributes of a run's tokenizer that an export reads."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...


@dataclass(frozen=True)
class ExportMetadata:
    """The files of an export besides its weights, written by one rank."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    copies: list[tuple[Path, str]]
    """Files to copy: source folder and file name."""

    def write(self, folder: Path) -> None:
        """Write all files to `folder`."""
        write_json(folder / CONFIG, dict(self.config))
        if self.generation:
            write_json(folder / GENERATION, dict(self.generation))
        for source, name in self.copies:
            copy_file(source, name, folder)


def export_metadata(
    config: Mapping[str, Any], base: Path | None, tokenizer: Path | None, run_ids: Callable[[], Mapping[str, Any]]
) -> ExportMetadata:
    """Return the files that accompany a model with this `config.json`.

    What training does not change comes from the folder `base`. Without a base model, token ids come from `run_ids`, or
    from the folder `tokenizer` if `run_ids` returns none. The tokenizer files come from `tokenizer`, else from `base`.

    Raises:
        CheckpointError: if a folder is missing or lacks the required files, or one of its files cannot be read.
    """
    for name, folder in (("base model", base), ("tokenizer", tokenizer)):
        if folder is not None and not folder.exists():
            raise CheckpointError(f"The folder of the {name} must exist, got {folder}.")
    base = None if base is None else folder_of(base)
    if tokenizer is not None and not tokenizer_files_in(tokenizer):
        raise CheckpointError(
            f"{tokenizer} must contain a tokenizer, got none of {', '.join(TOKENIZER_FILES)}. Pass the folder of a "
            "downloaded model."
        )
    ids: Mapping[str, Any] = {}
    if base is None:
        ids = run_ids() or ({} if tokenizer is None else _token_ids_in(tokenizer))
    merged = merge_config(config, base, ids)
    copies = [(tokenizer, name) for name in tokenizer_files_in(tokenizer)] if tokenizer is not None else []
    generation: dict[str, Any] | None = None
    if base is not None:
        names = (
            license_files_in(base) if tokenizer is not None else [*tokenizer_files_in(base), *license_files_in(base)]
        )
        copies += [(base, name) for name in names]
        generation = read_json(base / GENERATION) if regular_file_exists(base / GENERATION) else None
    if generation is None:  # derived as in transformers
        known = {key: merged[key] for key in _TOKEN_IDS if merged.get(key) is not None}
        generation = {"_from_model_config": True, **known} if known else None
    return ExportMetadata(merged, generation, copies)


def token_ids_of_run(config: Any) -> dict[str, Any]:
    """Return the token ids of the tokenizer in a run's config, `config.tokenizer.build()`, with `config.json` keys.

    Raises:
        CheckpointError: if the tokenizer cannot be built.
    """
    return _token_ids(lambda: getattr(config, "tokenizer", None))


def token_ids_of_saved_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the token ids of the tokenizer in a saved config. Raises the errors of `token_ids_of_run`."""
    data = (config or {}).get("tokenizer")
    return _token_ids(lambda: None if data is None else from_dict(data))


def _token_ids(find: Callable[[], Any]) -> dict[str, Any]:
    try:
        if (config := find()) is None:
            return {}
        tokenizer: Tokenizer = config.build()
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    except Exception as error:  # may come from the tokenizer, its files or the package that reads them
        raise CheckpointError(
            f"Cannot build the tokenizer of the run, which has the token ids of the export: {type(error).__name__}: "
            f"{error} Set --base-model (base_model=) to a folder whose config.json has the ids."
        ) from error
    return {key: value for key, value in ids.items() if value is not None}


def _token_ids_in(folder: Path) -> dict[str, Any]:
    """Return the token ids in the files of a tokenizer folder; an id may be a list of ids."""
    for name in (GENERATION, CONFIG):
        found = read_json(folder / name) if regular_file_exists(folder / name) else {}
        if found.get("eos_token_id") is not None:
            return {key: found[key] for key in _TOKEN_IDS if found.get(key) is not None}
    settings = (
        read_json(folder / "tokenizer_config.json") if regular_file_exists(folder / "tokenizer_config.json") else {}
    )
    try:
        tokens = {key: settings.get(name) for key, name in _TOKEN_IDS.items()}
        names = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items() if token}
        by_content = {token["content"]: int(id) for id, token in settings.get("added_tokens_decoder", {}).items()}
        if not by_content.keys() >= {*names.values()} and regular_file_exists(folder / "tokenizer.json"):
            whole = read_json(folder / "tokenizer.json")
            by_content |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        return {key: by_content[name] for key, name in names.items() if name in by_content}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} must contain tokenizer files in the format of transformers, got {error!r:.200}."
        ) from error
