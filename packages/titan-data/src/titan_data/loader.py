"""The loader of a training run: rows of token streams dealt out to any number of ranks, step by step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch
from titan_config import Configurable
from torch import Tensor

from titan_data.batch import Batch
from titan_data.identity import carried_over, check_identity
from titan_data.mtp import with_mtp_targets
from titan_data.order import Order
from titan_data.packing import COLUMNS, ENDED, Cursor, Packing, RowStream
from titan_data.saved_state import check_range, cursors_in
from titan_data.source import MapSource, Source
from titan_data.step import Share, Step, make_step
from titan_data.tokenizer import Tokenizer


class TokenLoader(Configurable):
    """Draws the same global batch at step k, whoever draws it.

    Row i of the global batch is the next row of stream i (mod the number of streams). The ranks of a step split the
    rows into contiguous parts; who they are may change at every step. `commit` with the sum of all ranks' `cursor_delta()`
    makes a step final, `rollback` gives its rows back. Reads ahead in one thread; an error there is raised by the
    `next_batches` it concerns. `build` takes `tokenizer`, `seq_len`, `global_batch_size` and `local_batch_size` (in rows), and
    `seed`.
    """

    class Config(Configurable.Config):
        source: Source.Config
        """Where the documents are."""
        num_streams: int | None = None
        """Streams the documents are dealt to; None: as many as rows in the global batch, which it must divide."""
        shuffle: bool = True
        """A new random order in every epoch; otherwise the source's own."""
        infinite: bool = True
        """Begin again after each epoch; otherwise end after one, with padding in the last rows."""
        prefetch: int = 4
        """Steps made ahead, in a thread; 0: none, each step is made when it is drawn."""
        add_bos: bool = False
        """Begin each document with the tokenizer's BOS."""
        add_eos: bool = False
        """End each document with the tokenizer's EOS."""
        mtp: bool = False
        """Batches hold the token after each, and the label after each, for models that predict two tokens."""
        allow_changes: bool = False
        """Resume from the state of other data or settings, where that is what is wanted."""

        def validate(self) -> None:
            if self.num_streams is not None:
                _require_positive("num_streams", self.num_streams)
            if self.prefetch < 0:
                raise ValueError(
                    f"Got prefetch {self.prefetch}. It is a number of steps, 0 or more. Set it to 4, or to 0 for none."
                )

        def batch_spec(self, *, seq_len: int, global_batch_size: int, local_batch_size: int) -> tuple[Batch, Tensor]:
            """A micro-batch and an `cursor_delta` of a loader, without reading anything: shapes on the meta device."""
            shape = (local_batch_size, seq_len)
            columns = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in COLUMNS}
            labels = columns.pop("labels")
            cursor_delta = torch.empty(self.num_streams or global_batch_size, 2, dtype=torch.int64, device="meta")
            sequence_dims = dict.fromkeys(COLUMNS, 1)
            batch = Batch(columns, {"labels": labels}, sequence_dims, [[]] * local_batch_size)
            return with_mtp_targets(batch) if self.mtp else batch, cursor_delta

    def __init__(
        self,
        config: Config,
        *,
        tokenizer: Tokenizer | None,
        seq_len: int,
        global_batch_size: int,
        local_batch_size: int,
        seed: int,
    ) -> None:
        if tokenizer is None:
            raise ValueError(
                "Got no tokenizer for a loader of texts. It makes the rows of a batch from their ids. Give the run a "
                "tokenizer, such as TiktokenTokenizer."
            )
        _require_positive("seq_len", seq_len)
        _require_positive("global_batch_size", global_batch_size)
        _require_positive("local_batch_size", local_batch_size)
        self._config = config
        self._tokenizer = tokenizer
        self._num_rows, self._micro_rows = global_batch_size, local_batch_size
        if global_batch_size % local_batch_size:
            raise ValueError(
                f"Got a global batch of {global_batch_size} rows in micro-batches of {local_batch_size}. Micro-batches "
                f"are whole. Set local_batch_size to {_divisors(global_batch_size)}."
            )
        self._num_streams = config.num_streams or global_batch_size
        if global_batch_size % self._num_streams:
            raise ValueError(
                f"Got {self._num_streams} streams for a global batch of {global_batch_size} rows. Each stream gives "
                f"the same number of rows a step. Set num_streams to {_divisors(global_batch_size)}."
            )
        self._source: Source = config.source.build()
        bos_id = _special_id(tokenizer.bos_id, "bos") if config.add_bos else None
        eos_id = _special_id(tokenizer.eos_id, "eos") if config.add_eos else None
        self._packing = Packing(seq_len, bos_id, eos_id)
        self._order = Order(seed, config.shuffle, config.infinite)
        self._cursors = [Cursor(0, 0)] * self._num_streams
        self._share: Share | None = None
        self._streams: dict[int, RowStream] = {}
        self._ahead: deque[Future[Step]] = deque()
        self._drawn: Step | None = None
        self._pool = ThreadPoolExecutor(1, "titan-data") if config.prefetch else _InThisThread()
        self._end_thread = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def next_batches(self, rank: int, num_ranks: int) -> list[Batch]:
        """Return this rank's micro-batches of the step: `local_batch_size` rows each; none after a finite loader's end.

        All ranks get as many: where the batch does not split evenly (ranks come and go), some get one of padding.
        All see the end at the same step; until then a stream that has ended gives rows of padding. Raises ValueError
        for a document that is no text; RuntimeError for a second draw without `commit` or `rollback`.
        """
        if self._drawn is not None:
            raise RuntimeError(
                "Got a second draw of one step. A step that was drawn ends with commit or rollback. "
                "Call one of them first."
            )
        share = self._new_share(rank, num_ranks)
        if all(cursor.tokens == ENDED for cursor in self._cursors):
            return []
        try:
            if share != self._share:
                self._take_over(share)
            if len(self._ahead) <= self._config.prefetch // 2:  # several at once: fewer turns between the threads
                missing = self._config.prefetch + 1 - len(self._ahead)
                self._ahead += [self._pool.submit(make_step, self._streams, share) for _ in range(missing)]
            self._drawn = self._ahead[0].result()
        except BaseException:
            self._forget()  # what was read ahead is lost; the next draw begins where the last commit was
            raise
        batches = self._drawn.batches
        return [with_mtp_targets(batch) for batch in batches] if self._config.mtp else batches

    def cursor_delta(self) -> Tensor:
        """Return how far this rank's draw moved each stream: int64 [streams, 2] (documents, tokens).

        Zero for streams another rank answers for: the sum over the ranks of the step moves each stream once.
        """
        drawn = self._moves_drawn()
        owned = [] if self._drawn is None else self._drawn.share.owned
        return torch.tensor([drawn[index] if index in owned else (0, 0) for index in range(self._num_streams)])

    def commit(self, cursor_delta: Tensor) -> None:
        """Make the step final. `cursor_delta` is the sum of `cursor_delta()` over all ranks of the step.

        A rank that drew nothing may commit what the others drew. Raises ValueError where this is not the sum of all.
        """
        moves = [(documents, tokens) for documents, tokens in cursor_delta.tolist()]
        self._check_moves(moves)
        if self._drawn is None:
            self._forget()
        else:
            self._ahead.popleft()
            self._drawn = None
        self._cursors = [
            Cursor(cursor.documents + documents, cursor.tokens + tokens)
            for cursor, (documents, tokens) in zip(self._cursors, moves, strict=True)
        ]

    def rollback(self) -> None:
        """Give the rows of the step back: the next draw returns them again."""
        self._drawn = None

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state as JSON values: two integers a stream, and the identity of the data."""
        cursors = self._cursors
        return {
            "documents": [cursor.documents for cursor in cursors],
            "tokens": [cursor.tokens for cursor in cursors],
            "identity": self.identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on any ranks.

        Raises ValueError naming what changed, unless `allow_changes`, and for a state that no loader can have saved;
        the loader is then as it was.
        """
        cursors, identity = cursors_in(state), self.identity()
        check_identity(state["identity"], identity, self._config.allow_changes)
        cursors = carried_over(cursors, state["identity"], identity)
        source, infinite = self._source, self._order.infinite
        check_range(cursors, len(source) if isinstance(source, MapSource) and not infinite else None)
        self._cursors = cursors
        self._forget()

    def identity(self) -> dict[str, Any]:
        """Return all that decides the rows, as JSON values."""
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "source": self._source.identity(),
            "seq_len": self._packing.seq_len,
            "global_batch_size": self._num_rows,
            "num_streams": self._num_streams,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "infinite": self._order.infinite,
            "bos_id": self._packing.bos_id,
            "eos_id": self._packing.eos_id,
        }

    def close(self) -> None:
        """End the thread that reads ahead, and wait for it. The loader cannot be drawn from afterwards."""
        self._end_thread.detach()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._forget()

    def _new_share(self, rank: int, num_ranks: int) -> Share:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"Got rank {rank} of {num_ranks}. Ranks count from 0. Set rank to 0 to {num_ranks - 1}.")
        whole = self._num_rows // self._micro_rows
        begin, end = (place * whole // num_ranks * self._micro_rows for place in (rank, rank + 1))
        sizes = self._num_rows, self._num_streams, self._micro_rows
        return Share(begin, end, *sizes, num_micro=-(-whole // num_ranks), seq_len=self._packing.seq_len)

    def _take_over(self, share: Share) -> None:
        """Make the streams of `share` ours: those we have go on with what was read ahead, others begin anew."""
        kept = self._streams
        steps = [future.result() for future in _stopped(self._ahead)]
        for step in reversed(steps):
            for index, rows in step.rows.items():
                kept[index].give_back(rows)
        self._share = share
        self._streams = {index: kept.get(index) or self._open(index) for index in share.read}

    def _open(self, index: int) -> RowStream:
        cursor = self._cursors[index]
        return RowStream(self._source, self._tokenizer, self._packing, self._order, index, self._num_streams, cursor)

    def _forget(self) -> None:
        """Drop all that was read and not committed."""
        for future in self._ahead:
            future.cancel()
        self._share, self._streams, self._ahead, self._drawn = None, {}, deque(), None

    def _moves_drawn(self) -> dict[int, tuple[int, int]]:
        """How far the step that was drawn moves each stream it read."""
        moves = {}
        for index, rows in ({} if self._drawn is None else self._drawn.rows).items():
            before, after = self._cursors[index], rows[-1].after
            moves[index] = (after.documents - before.documents, after.tokens - before.tokens)
        return moves

    def _check_moves(self, moves: list[tuple[int, int]]) -> None:
        still = [i for i, cursor in enumerate(self._cursors) if cursor.tokens != ENDED and not any(moves[i])]
        other = [i for i, move in self._moves_drawn().items() if moves[i] != move]
        if still or other:
            raise ValueError(
                f"Got an cursor_delta that {'does not move' if still else 'is not what was drawn for'} streams "
                f"{still or other}. Each stream moves as far as the rank that owns it drew. Commit the sum of "
                f"cursor_delta() over all data ranks."
            )


def _stopped(futures: deque[Future[Step]]) -> list[Future[Step]]:
    """Cancel what has not begun, the last first; return the rest."""
    begun = [future for future in reversed(futures) if not future.cancel()]
    futures.clear()
    return begun[::-1]


class _InThisThread(Executor):
    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _special_id(number: int | None, name: str) -> int:
    if number is None:
        raise ValueError(
            f"Got add_{name} with a tokenizer that has no {name}. It needs the id of that token. "
            f"Set the tokenizer's {name}, or add_{name} to False."
        )
    return number


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"Got {name} {value}. It must be 1 or more. Set {name} to a positive number.")


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
