"""Source of Hugging Face datasets: everything that `datasets.load_dataset` reads."""

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
    """Source of a Hugging Face dataset, streamed, or downloaded once and read with random access.

    `path="allenai/c4", name="en"` is a dataset on the hub; `path="json", data_files="data/*.jsonl"` reads local files.
    If streaming, each stream reads its own file shards: for speed, choose `num_streams` at most the number of shards.
    Resuming a stream then reads again everything before its cursor. Raises FileNotFoundError or ConnectionError if the
    dataset cannot be reached, ValueError for records without text.
    """

    class Config(Source.Config):
        path: str
        """The name of a dataset on the hub, a folder, or a format: json, parquet, csv, text, arrow."""
        name: str | None = None
        """The configuration of the dataset, such as `en`."""
        split: str = "train"
        """The split of the dataset."""
        revision: str | None = None
        """The commit or tag on the hub; None: the newest, which may change between two runs."""
        data_files: str | list[str] | None = None
        """Files or glob patterns to read; None: all files. This is the only field that accepts URLs: `hf://`,
        `https://`, and protocols with an installed fsspec package, such as `s3://`."""
        streaming: bool = True
        """Read the dataset while training; False downloads it first and shuffles over all documents. `datasets`
        downloads every split of `path`: to download one only, list its files in `data_files`."""
        text_field: str = "text"
        """The field with the text."""
        shuffle_buffer: int = 1000
        """Size of the shuffle buffer of each stream in documents, if streaming; the order of shards is shuffled too."""
        cache_dir: str | Path | None = None
        """The folder for downloads; None: the default of `datasets`."""

        def validate(self) -> None:
            if self.shuffle_buffer < 1:
                raise ValueError(f"shuffle_buffer must be at least 1 document, got {self.shuffle_buffer}.")

    def __init__(self, config: Config) -> None:
        if "://" in config.path:
            raise ValueError(
                f"path must be a dataset on the hub, a folder or a format, got {config.path!r}. For a URL, set path to "
                f'the file format and data_files to the URL: path="parquet", data_files="{config.path}".'
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
    """Return `datasets.load_dataset(...)`; errors name the dataset and the split.

    Raises FileNotFoundError or ConnectionError if the dataset cannot be reached, ValueError if it cannot be loaded.
    """
    import datasets

    where = None if cache_dir is None else str(cache_dir)
    what = f"The dataset {path}{f' ({name})' if name else ''}, split {choices.get('split')},"
    try:
        return datasets.load_dataset(path, name, cache_dir=where, **choices)
    except FileNotFoundError as error:
        raise FileNotFoundError(_message(what, error)) from error
    except ConnectionError as error:
        raise ConnectionError(_message(what, error)) from error
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(_message(what, error.__cause__ or error)) from error


def _message(what: str, error: BaseException) -> str:
    return (
        f"{what} cannot be loaded from the hub, the local cache or local files: {error}. "
        "Check the name, the files and the network connection."
    )
