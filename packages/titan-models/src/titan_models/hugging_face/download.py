"""Download of models, weights and tokenizer, from the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from titan_config import ConfigError, require_local

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken", "original/tokenizer.model", "LICENSE*")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class DownloadError(ValueError):
    """A model could not be downloaded; the message states the reason and the fix."""


def download(name: str, folder: Path) -> None:
    """Download weights (safetensors), config and tokenizer of the model `name` to a new folder.

    `name` is the name of the repository on the hub, `OWNER/MODEL`. The environment variables `HF_ENDPOINT` and
    `HF_TOKEN` set the address of the hub and the access token. An interrupted download is resumed by the next call.

    Raises:
        DownloadError: for a name that is not on the hub, a gated model whose license was not accepted, a model without
            safetensors, a folder that is remote or has other content, and if the hub cannot be reached.
    """
    try:
        require_local(folder, "The folder to download to")
    except ConfigError as error:
        raise DownloadError(str(error)) from error
    hub = _import_hub()
    if folder.exists() and not _is_resumable(folder):
        raise DownloadError(
            f"The folder to download to must be new, empty, or that of an interrupted download, got {folder}, which "
            "has other content. Use another folder."
        )
    with _convert_errors(hub.errors, name):
        info = hub.HfApi().model_info(name)
        files = _files_to_download([sibling.rfilename for sibling in info.siblings or []], name)
        hub.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=files)
    _check_complete(folder, files, name)
    shutil.rmtree(folder / ".cache")  # only needed to resume


@contextmanager
def _convert_errors(errors: Any, name: str) -> Iterator[None]:
    """Convert errors of huggingface_hub about the model `name` to DownloadError."""
    try:
        yield
    except errors.HFValidationError as error:
        raise DownloadError(
            f"The model name must be OWNER/MODEL, such as Qwen/Qwen3-0.6B, got {name!r}. Search it on "
            f"https://huggingface.co/models. ({error})"
        ) from error
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{name} is a gated model: its terms must be accepted before the download. Accept them on "
            f"https://huggingface.co/{name}, create an access token in your settings there, and set HF_TOKEN to it."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{name} was not found on the hub, or is private. Check the name (OWNER/MODEL) on "
            "https://huggingface.co/models; for a private model set HF_TOKEN."
        ) from error
    except (OSError, errors.HTTPError) as error:
        raise DownloadError(
            f"Downloading {name} failed: {error}. Check the connection to https://huggingface.co (or HF_ENDPOINT, if "
            "set), and run the command again to resume."
        ) from error


def _import_hub() -> Any:
    """Import huggingface_hub, which takes a second. Raises DownloadError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise DownloadError(
            "The package huggingface_hub must be installed to download models. Run pip install titan-models[download]."
        ) from error
    return huggingface_hub


def _is_resumable(folder: Path) -> bool:
    """Return whether a folder is empty or has an interrupted download."""
    return folder.is_dir() and ((folder / ".cache" / "huggingface").is_dir() or not any(folder.iterdir()))


def _files_to_download(names: list[str], model: str) -> list[str]:
    """Return the files to download: no weights of other formats, and no second copy of the weights."""
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if not weights:
        raise DownloadError(
            f"A model must have weights in model.safetensors or model-*-of-*.safetensors, got {model} without them."
        )
    others = [name for name in names if any(_matches(name, pattern) for pattern in _OTHER_FILES)]
    if _SINGLE in weights and len(weights) > 1:  # two copies: take that of transformers
        weights, others = [_SINGLE], [name for name in others if name != _INDEX]
    return weights + others


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _check_complete(folder: Path, files: list[str], model: str) -> None:
    needed = {*files, "config.json"}
    if (folder / _INDEX).is_file():
        needed |= _files_in_index(folder / _INDEX)
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise DownloadError(
            f"A model must have a config.json and all files of its index, got {model} without {', '.join(missing)}. "
            "Run the command again, or use a complete model."
        )


def _files_in_index(index: Path) -> set[str]:
    """Return the files in an index. Raises DownloadError for an invalid index, or one with files of other folders."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        invalid = [name for name in names if not isinstance(name, str) or not _WEIGHTS.fullmatch(name)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DownloadError(f"{index} must be JSON whose weight_map names files, got {error!r:.200}.") from error
    if invalid:
        raise DownloadError(
            f"{index} must name files such as model-00001-of-00002.safetensors, got {invalid[0]!r:.200}."
        )
    return names
