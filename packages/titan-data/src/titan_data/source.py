"""Sources of documents, and the order in which each stream reads them."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from titan_config import Configurable

from titan_data.order import Order, shuffled

BLOCK = 256
"""Positions permuted at once: the permutation of one position costs as much as that of a hundred."""


class Document(NamedTuple):
    """A text and a function that returns its place (file and line) for error messages."""

    text: str
    place: Callable[[], str]


class Source(Configurable, abc.ABC):
    """A source of documents, distributed over streams that together read each document once per epoch."""

    class Config(Configurable.Config):
        pass

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the documents; a resumed run compares them with the saved ones."""

    @abc.abstractmethod
    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        """Yield the documents of stream `index` (of `num_streams`), starting at number `start` (from 0).

        The documents depend on the arguments alone: a stream opened at `start + n` yields what a stream opened at
        `start` yields after n documents.
        """


class MapSource(Source):
    """A source with random access to its documents.

    Stream i reads positions i, i + num_streams, ... of the infinite order; position p is a document of epoch
    p // len(self). A subclass implements `__len__`, `text`, `place` and `identity`, and calls `_require_text` at the
    end of `__init__`.
    """

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def text(self, index: int) -> str:
        """Return the text of document `index`. Raises ValueError if the file has no valid text there."""

    @abc.abstractmethod
    def place(self, index: int) -> str:
        """Return the place of document `index` for error messages, such as "a.jsonl, line 3"."""

    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        num_empty = 0
        for number in self._numbers(index, num_streams, start, order):
            text = self.text(number)
            num_empty = 0 if text or order.shuffle else num_empty + 1  # without shuffle, epochs repeat the same texts
            if num_empty > len(self):
                raise ValueError(
                    f"Every stream must have a document with text, got only empty ones in stream {index} of "
                    f"{num_streams}. Set shuffle=True, or a num_streams that has no common factor with {len(self)}."
                )
            yield Document(text, functools.partial(self.place, number))

    def _numbers(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[int]:
        count = len(self)
        stop = None if order.infinite else max(0, -(-(count - index) // num_streams))
        while stop is None or start < stop:
            size = BLOCK if stop is None else min(BLOCK, stop - start)
            positions = (np.arange(start, start + size) * num_streams + index).astype(np.uint64)
            numbers = shuffled(positions, count, order.seed) if order.shuffle else positions % np.uint64(count)
            yield from numbers.tolist()
            start += size

    def _require_text(self) -> None:
        if not any(self.text(index) for index in range(len(self))):
            got = f"{len(self)} empty documents (first: {self.place(0)})" if len(self) else "no document"
            raise ValueError(
                f"{self.Config.__qualname__} must have at least one document with text, got {got}. Check the path and "
                "the name of the text field."
            )
