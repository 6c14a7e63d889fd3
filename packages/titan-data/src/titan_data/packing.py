"""Sequence packing: the tokens of a stream, cut into sequences of equal length, with document boundaries marked."""

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
BLOCK_TOKENS = 4096  # tokens packed at once: packing several short sequences together makes small documents cheap


class Cursor(NamedTuple):
    """The position of a stream: number of finished documents, and of tokens of the next one already used as inputs.

    `tokens` is -1 after the end of a finite stream. After a sequence, the cursor is at an existing token or at the end.
    """

    documents: int
    tokens: int


class PackedSequence(NamedTuple):
    """A sequence of T tokens: int64 [4, T] in the order of COLUMNS, its document ids, and the cursor after it."""

    columns: Ids
    sample_ids: list[int]
    after: Cursor


class Packing(NamedTuple):
    """Settings of sequence packing: sequence length in tokens, and the ids added before and after each document."""

    seq_len: int
    bos_id: int | None
    eos_id: int | None


class SequenceStream:
    """The packed sequences of stream `index`, starting at `cursor`.

    Every token of a document is an input once, and every token but the first is a label once, wherever sequences end:
    the label at the end of a sequence is the first input of the next. A document that continues in the next sequence
    keeps its id there; its positions start at 0 again, because its beginning is not visible from that sequence, and
    stay below `seq_len`. Empty documents are skipped. After its end a finite stream yields padding.
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
        self._tokens: Ids = np.empty(0, np.int64)  # encoded tokens that are not packed yet
        self._numbers: Ids = np.empty(0, np.int64)  # for each of these tokens, the number of its document in the stream
        self._counting = np.arange(max(1, BLOCK_TOKENS // packing.seq_len) * packing.seq_len)
        self._packed: deque[PackedSequence] = deque()
        self._opened = False

    def next_sequence(self) -> PackedSequence:
        """Return the next sequence. Raises ValueError, naming the document, if it has no text or cannot be encoded."""
        if not self._opened:
            self._go_to_cursor()
            self._opened = True
        if not self._packed:
            self._packed.extend(self._pack())
        return self._packed.popleft()

    def give_back(self, sequences: list[PackedSequence]) -> None:
        """Return sequences to the stream, in the order of `next_sequence`; they will be returned again first."""
        self._packed.extendleft(reversed(sequences))

    def _encoded(self, documents: Iterator[Document]) -> Iterator[tuple[int, Ids]]:
        """Yield the tokens of all documents in pieces, each with the number of its document in the stream."""
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
                    f"Stream {self._index} must have the same documents and tokenizer as in the saved state, got a "
                    f"document without token {done}, where the stream should resume. Restore them, or start a new run."
                )
            self._tokens, self._numbers = self._tokens[done:], self._numbers[done:]

    def _read(self, count: int) -> None:
        """Encode documents until `count` unpacked tokens are available, or the stream ends."""
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

    def _pack(self) -> list[PackedSequence]:
        """Pack the next tokens into one or more sequences; the label of a token is the next token of its document."""
        length, count = self._packing.seq_len, len(self._counting)
        self._read(count + 1)  # one more: the label of the last token
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
            PackedSequence(
                columns[:, i * length : (i + 1) * length],
                [number for number in ids[samples[i] : samples[i + 1]].tolist() if number != PADDING_ID],
                cursor,
            )
            for i, cursor in enumerate(cursors)
        ]

    def _cursors_at(self, places: Ids) -> list[Cursor]:
        """Return the cursor before each index of `places` into the unpacked tokens."""
        numbers = self._numbers[places[places < len(self._numbers)]]
        done = places[: len(numbers)] - np.searchsorted(self._numbers, numbers)
        done[numbers == self._cursor.documents] += self._cursor.tokens
        cursors = [Cursor(*pair) for pair in zip(numbers.tolist(), done.tolist(), strict=True)]
        return cursors + [Cursor(self._num_read, ENDED)] * (len(places) - len(cursors))


def _padded(values: Ids, count: int, padding: int) -> Ids:
    """Return the first `count` values, padded with `padding` if there are fewer."""
    return values[:count] if len(values) >= count else np.pad(values, (0, count - len(values)), constant_values=padding)
