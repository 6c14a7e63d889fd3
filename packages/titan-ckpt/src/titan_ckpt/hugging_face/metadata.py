"""What an export has beside its weights: `config.json`, generation settings, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titan_config import from_dict

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.durable_files import write_json
from titan_ckpt.format.strict_json import is_there, read_json
from titan_ckpt.hugging_face.base_folder import (
    CONFIG,
    GENERATION,
    TOKENIZER_FILES,
    copy_file,
    merge_config,
    terms_in,
    tokenizer_in,
)
from titan_ckpt.hugging_face.weight_files import folder_of

_IDS = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}


class Tokenizer(Protocol):
    """What is asked of the tokenizer of a run."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...


@dataclass(frozen=True)
class Companions:
    """The files of an export but for its weights, to be written by one rank."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    copies: list[tuple[Path, str]]
    """Folders and names of files in them."""

    def write(self, folder: Path) -> None:
        """Write all of them."""
        write_json(folder / CONFIG, dict(self.config))
        if self.generation:
            write_json(folder / GENERATION, dict(self.generation))
        for source, name in self.copies:
            copy_file(source, name, folder)


def companions(
    config: Mapping[str, Any], base: Path | None, tokenizer: Path | None, run_ids: Callable[[], Mapping[str, Any]]
) -> Companions:
    """Return what goes with a model of this `config.json`.

    What training does not change is that of the folder `base`. Without one, ids of tokens are those of `run_ids`, and
    at last those that the folder `tokenizer` tells. The tokenizer's files are those of `tokenizer`, else of `base`.

    Raises:
        CheckpointError: when a folder is not there or lacks what it is given for, or one of its files cannot be read.
    """
    for name, folder in (("base model", base), ("tokenizer", tokenizer)):
        if folder is not None and not folder.exists():
            raise CheckpointError(f"The folder of the {name} must be there, got {folder}.")
    base = None if base is None else folder_of(base)
    if tokenizer is not None and not tokenizer_in(tokenizer):
        raise CheckpointError(
            f"{tokenizer} must hold a tokenizer, got none of {', '.join(TOKENIZER_FILES)}. Give the folder that a "
            f"model was downloaded to, or none."
        )
    ids: Mapping[str, Any] = {}
    if base is None:
        ids = run_ids() or ({} if tokenizer is None else _ids_in(tokenizer))
    merged = merge_config(config, base, ids)
    copies = [(tokenizer, name) for name in tokenizer_in(tokenizer)] if tokenizer is not None else []
    generation: dict[str, Any] | None = None
    if base is not None:
        names = terms_in(base) if tokenizer is not None else [*tokenizer_in(base), *terms_in(base)]
        copies += [(base, name) for name in names]
        generation = read_json(base / GENERATION) if is_there(base / GENERATION) else None
    if generation is None:  # as transformers derives it
        known = {key: merged[key] for key in _IDS if merged.get(key) is not None}
        generation = {"_from_model_config": True, **known} if known else None
    return Companions(merged, generation, copies)


def ids_of_run(config: Any) -> dict[str, Any]:
    """Return the ids of the tokenizer of a run's config, `config.tokenizer.build()`, as a `config.json` names them.

    Raises:
        CheckpointError: when the tokenizer cannot be built here.
    """
    return _ids_of(lambda: getattr(config, "tokenizer", None))


def ids_of_saved(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `ids_of_run` does, of a config that was saved."""
    data = (config or {}).get("tokenizer")
    return _ids_of(lambda: None if data is None else from_dict(data))


def _ids_of(find: Callable[[], Any]) -> dict[str, Any]:
    try:
        if (config := find()) is None:
            return {}
        tokenizer: Tokenizer = config.build()
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    except Exception as error:  # of any tokenizer, of its files, or of the package that reads them
        raise CheckpointError(
            f"The tokenizer of the run must be readable for the ids of its tokens, got {type(error).__name__}: {error} "
            f"Give --base-model (base_model=) with a folder whose config.json has them."
        ) from error
    return {key: value for key, value in ids.items() if value is not None}


def _ids_in(folder: Path) -> dict[str, Any]:
    """The ids that the files of a tokenizer's folder tell; lists of them, where there are."""
    for name in (GENERATION, CONFIG):
        told = read_json(folder / name) if is_there(folder / name) else {}
        if told.get("eos_token_id") is not None:
            return {key: told[key] for key in _IDS if told.get(key) is not None}
    settings = read_json(folder / "tokenizer_config.json") if is_there(folder / "tokenizer_config.json") else {}
    try:
        tokens = {key: settings.get(name) for key, name in _IDS.items()}
        names = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items() if token}
        by_content = {token["content"]: int(id) for id, token in settings.get("added_tokens_decoder", {}).items()}
        if not by_content.keys() >= {*names.values()} and is_there(folder / "tokenizer.json"):
            whole = read_json(folder / "tokenizer.json")
            by_content |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        return {key: by_content[name] for key, name in names.items() if name in by_content}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} must hold the files of a tokenizer as transformers writes them, got {error!r:.200}."
        ) from error
