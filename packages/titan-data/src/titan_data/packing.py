"""From documents to rows: one stream's tokens cut into rows of equal length, document borders kept."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from titan_data.batch import IGNORED_LABEL, PADDING_ID
from titan_data.order import Order
from titan_data.source import Document, Source
from titan_data.tokenizer import Ids, Tokenizer, is_failure

ENDED = -1
COLUMNS = ("tokens", "positions", "document_ids", "labels")
BLOCK_TOKENS = 4096  # short rows are made several at once, which is what makes small documents cheap


class Cursor(NamedTuple):
    """Where a stream stands: documents it has finished, and tokens of the next one that were inputs.

    `tokens` is -1 where a finite stream has ended. After a row a cursor stands at a token that is there, or at the end.
    """

    documents: int
    tokens: int


class Row(NamedTuple):
    """One row of T tokens: int64 [4, T] in the order of COLUMNS, its documents, where the stream stands after it."""

    columns: Ids
    sample_ids: list[int]
    after: Cursor


class Packing(NamedTuple):
    """How documents become rows: the row's length, and the ids put before and after each document."""

    seq_len: int
    bos_id: int | None
    eos_id: int | None


class RowStream:
    """The rows of stream `index` from `cursor` on.

    Every token of a document is an input once, and every token but the first is a label once, wherever rows end:
    the label at the end of a row is the first input of the next. A document that goes on in the next row keeps its
    id there; its positions begin at 0 again, because what it continues is out of sight, and stay below `seq_len`.
    Empty documents are passed over. After its end a finite stream gives rows of padding.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        packing: Packing,
        order: Order,
        index: int,
        num_streams: int,
        cursor: Cursor,
    ) -> None:
        self._tokenizer, self._packing = tokenizer, packing
        self._index, self._num_streams, self._cursor = index, num_streams, cursor
        self._num_read = cursor.documents
        self._parts = self._encoded(source.stream(index, num_streams, cursor.documents, order))
        self._tokens: Ids = np.empty(0, np.int64)  # those to come, as far as they are encoded,
        self._numbers: Ids = np.empty(0, np.int64)  # and which of the stream's documents each is of
        self._counting = np.arange(max(1, BLOCK_TOKENS // packing.seq_len) * packing.seq_len)
        self._rows: deque[Row] = deque()
        self._opened = False

    def next_row(self) -> Row:
        """Return the next row. Raises ValueError naming the document that has no text or cannot be encoded."""
        if not self._opened:
            self._go_to_cursor()
            self._opened = True
        if not self._rows:
            self._rows.extend(self._pack())
        return self._rows.popleft()

    def give_back(self, rows: list[Row]) -> None:
        """Put rows that were taken, in the order they were taken in, before those to come."""
        self._rows.extendleft(reversed(rows))

    def _encoded(self, documents: Iterator[Document]) -> Iterator[tuple[int, Ids]]:
        """Yield the tokens of all documents in pieces, each with its document's number in the stream."""
        bos, eos = ([] if i is None else [np.array([i])] for i in (self._packing.bos_id, self._packing.eos_id))
        for number, document in enumerate(documents, self._cursor.documents):
            self._num_read = number + 1
            if not document.text:
                continue
            try:
                for ids in itertools.chain(bos, self._tokenizer.encode_parts(document.text), eos):
                    yield number, ids
            except BaseException as error:
                if not is_failure(error):
                    raise
                raise ValueError(f"{document.place()} cannot be encoded. {error}") from error

    def _go_to_cursor(self) -> None:
        number, done = self._cursor
        if done == ENDED:
            self._parts = iter(())
        elif done:
            self._read(done + 1)
            if len(self._numbers) <= done or self._numbers[done] != number:
                raise ValueError(
                    f"Got stream {self._index} to resume at token {done} of a document that is shorter. The same "
                    f"source and tokenizer as before are needed. Give it those, or begin anew."
                )
            self._tokens, self._numbers = self._tokens[done:], self._numbers[done:]

    def _read(self, count: int) -> None:
        """Have `count` tokens ahead, or all there are."""
        pieces, numbers, lengths = [self._tokens], [], []
        missing = count - len(self._tokens)
        while missing > 0 and (part := next(self._parts, None)) is not None:
            number, ids = part
            pieces.append(ids)
            numbers.append(number)
            lengths.append(len(ids))
            missing -= len(ids)
        if numbers:
            self._tokens = np.concatenate(pieces, dtype=np.int64)
            self._numbers = np.concatenate([self._numbers, np.repeat(numbers, lengths)])

    def _pack(self) -> list[Row]:
        """Make some rows: the tokens in order, each with the next of its document as its label."""
        length, count = self._packing.seq_len, len(self._counting)
        self._read(count + 1)  # one more: the label of the last
        tokens, numbers = _padded(self._tokens, count + 1, 0), _padded(self._numbers, count + 1, ENDED)
        ends = numbers[1:] != numbers[:-1]
        begins = np.empty(count, bool)
        begins[1:] = ends[:-1]
        begins[::length] = True
        places = np.flatnonzero(begins)
        lengths = np.diff(places, append=count)
        ids = self._index + numbers[places] * self._num_streams
        ids[numbers[places] == ENDED] = PADDING_ID

        columns = np.empty((len(COLUMNS), count), np.int64)
        columns[0] = tokens[:-1]
        columns[1] = self._counting - np.repeat(places, lengths)
        columns[2] = np.repeat(ids, lengths)
        columns[3] = np.where(ends | (numbers[1:] == ENDED), IGNORED_LABEL, tokens[1:])
        borders = np.arange(0, count + 1, length)
        cursors = self._cursors_at(borders[1:])
        samples = np.searchsorted(places, borders).tolist()
        self._cursor = cursors[-1]
        self._tokens, self._numbers = self._tokens[count:], self._numbers[count:]
        return [
            Row(
                columns[:, row * length : (row + 1) * length],
                [number for number in ids[samples[row] : samples[row + 1]].tolist() if number != PADDING_ID],
                cursor,
            )
            for row, cursor in enumerate(cursors)
        ]

    def _cursors_at(self, places: Ids) -> list[Cursor]:
        """Return the cursor before each of `places` in the tokens ahead."""
        numbers = self._numbers[places[places < len(self._numbers)]]
        done = places[: len(numbers)] - np.searchsorted(self._numbers, numbers)
        done[numbers == self._cursor.documents] += self._cursor.tokens
        cursors = [Cursor(*pair) for pair in zip(numbers.tolist(), done.tolist(), strict=True)]
        return cursors + [Cursor(self._num_read, ENDED)] * (len(places) - len(cursors))


def _padded(values: Ids, count: int, padding: int) -> Ids:
    """Return the first `count` values, with padding where there are fewer."""
    return values[:count] if len(values) >= count else np.pad(values, (0, count - len(values)), constant_values=padding)
