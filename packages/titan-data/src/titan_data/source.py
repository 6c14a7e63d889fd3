"""Where documents come from, and in which order each stream reads them."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from titan_config import Configurable

from titan_data.order import Order, shuffled

BLOCK = 256
"""Positions looked up at once: the permutation costs as much for one as for a hundred."""


class Document(NamedTuple):
    """A text and, for errors, a function that says in words where it is from."""

    text: str
    place: Callable[[], str]


class Source(Configurable, abc.ABC):
    """Texts, one a document, dealt out to streams that together read each document once an epoch."""

    class Config(Configurable.Config):
        pass

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells these documents from others, as JSON values; a resumed run compares it."""

    @abc.abstractmethod
    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        """Yield the documents of stream `index` (of `num_streams`) from its `start`-th on.

        They depend on the arguments alone: opened later at `start + n`, a stream goes on as if it had been read on.
        """


class MapSource(Source):
    """A source whose documents can be read in any order, by number.

    Stream i reads positions i, i + num_streams, ... of the endless order; position p is a document of epoch
    p // len(self). A subclass states `__len__`, `text`, `place` and `identity`, and calls `_require_text` when open.
    """

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def text(self, index: int) -> str:
        """Return the text of a document. Raises ValueError where the file has none at that place."""

    @abc.abstractmethod
    def place(self, index: int) -> str:
        """Say in words where a document is."""

    def stream(self, index: int, num_streams: int, start: int, order: Order) -> Iterator[Document]:
        barren = 0
        for number in self._numbers(index, num_streams, start, order):
            text = self.text(number)
            barren = 0 if text or order.shuffle else barren + 1  # without a shuffle, the same ones come again
            if barren > len(self):
                raise ValueError(
                    f"Got nothing but empty documents in stream {index} of {num_streams}. Every stream needs some "
                    f"text. Shuffle, or choose a number of streams without a factor in common with {len(self)}."
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
            what = f"{len(self)} documents, all of them empty ({self.place(0)} first)" if len(self) else "no document"
            raise ValueError(
                f"Got {what}, in {self.Config.__qualname__}. At least one with text is needed. Check the path and the "
                "name of the text field."
            )
