"""Records that come one after the other, as documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from titan_data.arrow_texts import missing_field
from titan_data.order import Order, epoch_seed
from titan_data.source import Document, Source


class StreamedTexts(Source):
    """The texts of a `datasets.IterableDataset`.

    Each stream has file shards of its own; where there are fewer shards than streams, some share one and take its
    documents in turn, and each reads all of it. A stream is resumed by reading past what it has had.
    """

    def __init__(self, dataset: Any, text_field: str, shuffle_buffer: int, name: str, identity: dict[str, Any]) -> None:
        self._dataset, self._field, self._shuffle_buffer = dataset, text_field, shuffle_buffer
        self._name, self._identity = name, identity

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "shards": self._dataset.num_shards, "shuffle_buffer": self._shuffle_buffer}

    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        count = itertools.count()
        for epoch in itertools.count() if order.infinite else range(1):
            barren = True
            for text in self._epoch(index, num_streams, epoch, order):
                barren = barren and not text
                number = next(count)
                if number >= start:
                    yield Document(text, lambda number=number: self._place(index, number))  # type: ignore[misc]
            if barren and order.infinite:
                raise ValueError(
                    f"Got an epoch without any text for stream {index} of {num_streams} in {self._name}. Every stream "
                    f"needs some. Give it more text, or at most as many streams as shards ({self._dataset.num_shards})."
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
                    f"Got a record that cannot be read in {self._name}, number {number + 1} of its shards ({error}). "
                    f"Each record must be whole. Correct the file it is in."
                ) from error

    def _text(self, record: dict[str, Any]) -> str:
        if self._field not in record:
            raise missing_field(self._field, list(record), self._name)
        text = record[self._field]
        if not isinstance(text, str):
            raise ValueError(
                f"Got {self._field!r} of type {type(text).__name__} in {self._name}. The text must be a string. "
                f"Set text_field, or correct the data."
            )
        return text

    def _place(self, index: int, number: int) -> str:
        return f"{self._name}, document {number + 1} of stream {index}"
