"""From documents to rows: one stream's tokens cut into rows of equal length, document borders kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from titan_data.batch import IGNORED_LABEL, PADDING_ID
from titan_data.order import Order
from titan_data.source import Document, Source
from titan_data.tokenizer import Ids, Tokenizer

ENDED = -1


class Cursor(NamedTuple):
    """Where a stream stands: documents it has finished, and tokens of the next one that were inputs.

    `tokens` is -1 where a finite stream has ended. After a row a cursor stands at a token that is there, or at the end.
    """

    documents: int
    tokens: int


class Row(NamedTuple):
    """One row of T tokens, int64 [T] each, the documents in it, and where its stream stands after it."""

    tokens: Ids
    positions: Ids
    document_ids: Ids
    labels: Ids
    sample_ids: list[int]
    after: Cursor


class Packing(NamedTuple):
    """How documents become rows: the row's length, and the ids put before and after each document."""

    seq_len: int
    bos_id: int | None
    eos_id: int | None


class RowStream:
    """The rows of stream `index` from `cursor` on.

    Every token of a document is an input once, and every token but the first is a label once, wherever rows end: the
    label at the end of a row is the first input of the next. A document that goes on in the next row keeps its id there;
    its positions begin at 0 again, because what it continues is out of sight, and stay below `seq_len`. Documents
    without tokens are passed over. After its end a finite stream gives rows of padding.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, packing: Packing, order: Order, index: int, num_streams: int, cursor: Cursor
    ) -> None:
        self._source, self._tokenizer, self._packing, self._order = source, tokenizer, packing, order
        self._index, self._num_streams = index, num_streams
        self._cursor = cursor
        self._documents: Iterator[Document] | None = None
        self._ids: Ids = np.empty(0, np.int64)
        self._given_back: deque[Row] = deque()
        self._counting = np.arange(packing.seq_len)
        self._bos = np.array([] if packing.bos_id is None else [packing.bos_id], np.int64)
        self._eos = np.array([] if packing.eos_id is None else [packing.eos_id], np.int64)

    def next_row(self) -> Row:
        """Return the next row. Raises ValueError naming the document that has no text or cannot be encoded."""
        if self._given_back:
            return self._given_back.popleft()
        if self._documents is None:
            self._open()
        return self._pack()

    def give_back(self, rows: list[Row]) -> None:
        """Put rows that were taken, in the order they were taken in, before those to come."""
        self._given_back.extendleft(reversed(rows))

    def _open(self) -> None:
        documents, tokens = self._cursor
        self._documents = self._source.stream(self._index, self._num_streams, documents, self._order)
        if tokens == ENDED:
            return
        self._cursor = Cursor(documents, ENDED)
        self._read_document(documents)
        if tokens and (self._cursor != Cursor(documents, 0) or tokens >= len(self._ids)):
            raise ValueError(
                f"Got a stream to resume at token {tokens} of a document that has {len(self._ids)}. The same source and "
                f"tokenizer as before are needed. Give back the old ones, or begin anew."
            )
        self._cursor = Cursor(self._cursor.documents, self._cursor.tokens or tokens)

    def _read_document(self, number: int) -> None:
        """Make the first document with tokens from `number` on the current one, or stand at the end."""
        assert self._documents is not None
        for document in self._documents:
            self._ids = self._encoded(document) if document.text else self._ids[:0]
            if len(self._ids):
                self._cursor = Cursor(number, 0)
                return
            number += 1
        self._cursor = Cursor(number, ENDED)

    def _encoded(self, document: Document) -> Ids:
        try:
            ids = self._tokenizer.encode(document.text)
        except ValueError as error:
            raise ValueError(f"Got a document that cannot be encoded: {document.place()}. {error}") from error
        return np.concatenate([self._bos, ids, self._eos]) if len(ids) else ids

    def _pack(self) -> Row:
        length = self._packing.seq_len
        tokens = np.zeros(length, np.int64)
        positions = self._counting.copy()
        document_ids = np.full(length, PADDING_ID, np.int64)
        labels = np.full(length, IGNORED_LABEL, np.int64)
        sample_ids = []
        begin = 0
        while begin < length and self._cursor.tokens != ENDED:
            documents, first = self._cursor
            last = min(first + length - begin, len(self._ids))
            end = begin + last - first
            sample_ids.append(self._index + documents * self._num_streams)
            tokens[begin:end] = self._ids[first:last]
            positions[begin:end] = self._counting[: last - first]
            document_ids[begin:end] = sample_ids[-1]
            following = self._ids[first + 1 : last + 1]
            labels[begin : begin + len(following)] = following
            begin = end
            if last < len(self._ids):
                self._cursor = Cursor(documents, last)
            else:
                self._read_document(documents + 1)
        positions[begin:] = self._counting[: length - begin]
        return Row(tokens, positions, document_ids, labels, sample_ids, self._cursor)
