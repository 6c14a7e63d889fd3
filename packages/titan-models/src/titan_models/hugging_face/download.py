"""Public models from the Hugging Face hub, weights and tokenizer."""

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
_WANTED = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken", "original/tokenizer.model", "LICENSE*")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class DownloadError(ValueError):
    """A model could not be downloaded; the message says what was got, what is needed and what to do."""


def download(name: str, folder: Path) -> None:
    """Bring the weights (safetensors), the config and the tokenizer of the model `name` to a new folder.

    `name` is the hub's, `OWNER/MODEL`. The environment says where the hub is (`HF_ENDPOINT`) and who asks (`HF_TOKEN`).
    What was interrupted goes on where it stopped when it is asked for again.

    Raises:
        DownloadError: for names that the hub does not know, models whose license is to be accepted first, models
            without safetensors, folders that hold something else or are remote, and when the hub cannot be reached.
    """
    try:
        require_local(folder, "The folder to download to")
    except ConfigError as error:
        raise DownloadError(str(error)) from error
    hub = _hub()
    if folder.exists() and not _is_begun(folder):
        raise DownloadError(
            f"Got {folder} to download to, which is there already. A model is downloaded to a folder of its own. Give "
            "another name."
        )
    with _explained(hub.errors, name):
        info = hub.HfApi().model_info(name)
        files = _wanted([sibling.rfilename for sibling in info.siblings or []], name)
        hub.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=files)
    _check_whole(folder, files, name)
    shutil.rmtree(folder / ".cache")  # what the hub's library needs to go on with


@contextmanager
def _explained(errors: Any, name: str) -> Iterator[None]:
    """Raise DownloadError for what the hub's library raises about the model `name`."""
    try:
        yield
    except errors.HFValidationError as error:
        raise DownloadError(
            f"Got {name!r} for a model. The hub names them OWNER/MODEL, like Qwen/Qwen3-0.6B. Look the name up on "
            f"https://huggingface.co/models. ({error})"
        ) from error
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"Got {name}, whose owner gives it to those who accepted the terms. Open https://huggingface.co/{name}, "
            "accept them, make a token in your settings there, and set HF_TOKEN to it."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"Got {name}, which the hub does not have, or does not show you. Names are OWNER/MODEL, as on "
            "https://huggingface.co/models. Correct it; for a private model set HF_TOKEN."
        ) from error
    except (OSError, errors.HTTPError) as error:
        raise DownloadError(
            f"Got no answer from the hub about {name}, or not all of it: {error}. It is reached over the network, at "
            "https://huggingface.co or what HF_ENDPOINT says. Try again: what is there is kept."
        ) from error


def _hub() -> Any:
    """The package huggingface_hub, which takes a second to import. Raises DownloadError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise DownloadError(
            "Got no package huggingface_hub. It speaks to the hub. Run pip install titan-models[download]."
        ) from error
    return huggingface_hub


def _is_begun(folder: Path) -> bool:
    """Whether a folder is empty, or was left by a download that was interrupted."""
    return folder.is_dir() and ((folder / ".cache" / "huggingface").is_dir() or not any(folder.iterdir()))


def _wanted(names: list[str], model: str) -> list[str]:
    """The files of a model that are of use here: not those of other formats, nor the same weights a second time."""
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if not weights:
        raise DownloadError(
            f"Got {model}, which has no model.safetensors, nor several files of it. Weights are read from safetensors. "
            "Take a model that has them."
        )
    others = [name for name in names if any(_fits(name, pattern) for pattern in _WANTED)]
    if _SINGLE in weights and len(weights) > 1:  # two sets: the one that transformers takes
        weights, others = [_SINGLE], [name for name in others if name != _INDEX]
    return weights + others


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _check_whole(folder: Path, files: list[str], model: str) -> None:
    needed = {*files, "config.json"}
    if (folder / _INDEX).is_file():
        needed |= _named_in(folder / _INDEX)
    if absent := sorted(name for name in needed if not (folder / name).is_file()):
        raise DownloadError(
            f"Got {model} without {', '.join(absent)}. A model has a config.json and all files of its index. Take a "
            "model that is whole, or try again."
        )


def _named_in(index: Path) -> set[str]:
    """The files that an index names. Raises DownloadError for an index that names none, or files of other folders."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        odd = [name for name in names if not isinstance(name, str) or not _WEIGHTS.fullmatch(name)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DownloadError(f"{index} must be JSON whose weight_map names files, got {error!r:.200}.") from error
    if odd:
        raise DownloadError(f"{index} must name files such as model-00001-of-00002.safetensors, got {odd[0]!r:.200}.")
    return names
