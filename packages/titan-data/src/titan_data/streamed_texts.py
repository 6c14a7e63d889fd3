"""Source of documents from a streamed (iterable) dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from titan_data.arrow_texts import missing_field
from titan_data.order import Order, epoch_seed
from titan_data.source import Document, Source


class StreamedTexts(Source):
    """Source of the texts of a `datasets.IterableDataset`.

    Each stream reads its own file shards. With fewer shards than streams, the streams of a shard take its documents in
    turn, and each of them reads the whole shard. To resume, a stream reads and skips the documents before its cursor.
    """

    def __init__(self, dataset: Any, text_field: str, shuffle_buffer: int, name: str, identity: dict[str, Any]) -> None:
        self._dataset, self._field, self._shuffle_buffer = dataset, text_field, shuffle_buffer
        self._name, self._identity = name, identity

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "shards": self._dataset.num_shards, "shuffle_buffer": self._shuffle_buffer}

    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        count = itertools.count()
        for epoch in itertools.count() if order.infinite else range(1):
            is_empty = True
            for text in self._epoch(index, num_streams, epoch, order):
                is_empty = is_empty and not text
                number = next(count)
                if number >= start:
                    yield Document(text, lambda number=number: self._place(index, number))  # type: ignore[misc]
            if is_empty and order.infinite:
                raise ValueError(
                    f"{self._name}: every stream must have text in each epoch, got none for stream {index} of "
                    f"{num_streams}. Add data, or set num_streams to at most the number of shards "
                    f"({self._dataset.num_shards})."
                )

    def _epoch(self, index: int, num_streams: int, epoch: int, order: Order) -> Iterator[str]:
        num_shards = min(self._dataset.num_shards, num_streams)
        shard = index % num_shards
        records = self._dataset.shard(num_shards=num_shards, index=shard)
        if order.shuffle:
            records = records.shuffle(seed=epoch_seed(order.seed, epoch), buffer_size=self._shuffle_buffer)
        sharing = len(range(shard, num_streams, num_shards))
        turns = itertools.islice(self._records(records), index // num_shards, None, sharing)
        return (self._text(record) for record in turns)

    def _records(self, records: Any) -> Iterator[dict[str, Any]]:
        iterator = iter(records)
        for number in itertools.count():
            try:
                yield next(iterator)
            except StopIteration:
                return
            except ValueError as error:
                raise ValueError(
                    f"{self._name}: the shards of this stream cannot be read after record {number}: {error}"
                ) from error

    def _text(self, record: dict[str, Any]) -> str:
        if self._field not in record:
            raise missing_field(self._field, list(record), self._name)
        text = record[self._field]
        if not isinstance(text, str):
            raise ValueError(
                f"{self._name}: the field {self._field!r} must be a string, got {type(text).__name__}. "
                "Set text_field, or correct the data."
            )
        return text

    def _place(self, index: int, number: int) -> str:
        return f"{self._name}, document {number + 1} of stream {index}"
