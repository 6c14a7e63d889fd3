"""Datasets of the Hugging Face hub, and whatever else `datasets.load_dataset` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_config import require_local

from titan_data.arrow_texts import ArrowTexts
from titan_data.order import Order
from titan_data.source import Document, Source
from titan_data.streamed_texts import StreamedTexts


class HuggingFaceSource(Source):
    """A dataset by name, streamed, or downloaded once and then read in any order.

    `path="allenai/c4", name="en"` is a dataset of the hub; `path="json", data_files="data/*.jsonl"` reads local files.
    Streams are tied to file shards: for speed let `num_streams` be no more than the dataset has shards. Resuming a
    stream reads again all it has had. Raises FileNotFoundError or ConnectionError where the dataset cannot be
    reached, ValueError for records without text.
    """

    class Config(Source.Config):
        path: str
        """The dataset's name on the hub, a folder, or a format: json, parquet, csv, text, arrow."""
        name: str | None = None
        """The dataset's configuration, such as `en`."""
        split: str = "train"
        """The part of it."""
        revision: str | None = None
        """The commit or tag on the hub; None: the newest, which may change between two runs."""
        data_files: str | list[str] | None = None
        """The files to read, or patterns of them; None: all. Here, and only here, URLs are read: `hf://`, `https://`,
        and what fsspec has a package for, such as `s3://`."""
        streaming: bool = True
        """Read while training; otherwise download it all first, and shuffle it perfectly. `datasets` downloads every
        split of `path`: to have one alone, name its files in `data_files`."""
        text_field: str = "text"
        """The field that holds the text."""
        shuffle_buffer: int = 1000
        """Documents a stream shuffles among, when streaming; the order of shards is shuffled too."""
        cache_dir: str | Path | None = None
        """Where downloads are kept; None: where `datasets` keeps them."""

        def validate(self) -> None:
            if self.shuffle_buffer < 1:
                raise ValueError(f"shuffle_buffer must be at least 1 document, got {self.shuffle_buffer}.")

    def __init__(self, config: Config) -> None:
        if "://" in config.path:
            raise ValueError(
                f"path must be a dataset of the hub, a folder or a format, got {config.path!r}. URLs go into "
                f'data_files, with their format as path: path="parquet", data_files="{config.path}".'
            )
        if config.cache_dir is not None:
            require_local(config.cache_dir, "cache_dir")
        dataset = load_dataset(
            config.path,
            config.name,
            split=config.split,
            revision=config.revision,
            data_files=config.data_files,
            streaming=config.streaming,
            cache_dir=config.cache_dir,
        )
        name = " ".join(part for part in (config.path, config.name, config.split) if part)
        identity = {
            "kind": "HuggingFaceSource",
            "path": config.path,
            "name": config.name,
            "split": config.split,
            "revision": config.revision,
            "data_files": config.data_files if isinstance(config.data_files, str | None) else list(config.data_files),
            "streaming": config.streaming,
            "text_field": config.text_field,
        }
        self._texts: Source = (
            StreamedTexts(dataset, config.text_field, config.shuffle_buffer, name, identity)
            if config.streaming
            else ArrowTexts(dataset, config.text_field, name, identity)
        )

    def identity(self) -> dict[str, Any]:
        return self._texts.identity()

    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        return self._texts.stream(index, num_streams, start, order)


def load_dataset(path: str, name: str | None = None, *, cache_dir: str | Path | None, **choices: Any) -> Any:
    """Call `datasets.load_dataset`; what it cannot load is an error that says what was asked for."""
    import datasets

    where = None if cache_dir is None else str(cache_dir)
    told = f"The dataset {path}{f' ({name})' if name else ''}, split {choices.get('split')},"
    try:
        return datasets.load_dataset(path, name, cache_dir=where, **choices)
    except FileNotFoundError as error:
        raise FileNotFoundError(_advice(told, error)) from error
    except ConnectionError as error:
        raise ConnectionError(_advice(told, error)) from error
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(_advice(told, error.__cause__ or error)) from error


def _advice(told: str, error: BaseException) -> str:
    return (
        f"{told} must be on the hub and reachable, in the local cache, or in local files, got an error: {error}. "
        f"Check the name, the files and the connection."
    )
