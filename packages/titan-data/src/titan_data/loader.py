"""The data loader of a training run: packed token sequences, distributed over any number of ranks at each step."""

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
from titan_data.packing import COLUMNS, ENDED, Cursor, Packing, SequenceStream
from titan_data.saved_state import check_range, cursors_in
from titan_data.source import MapSource, Source
from titan_data.step import Share, Step, make_step
from titan_data.tokenizer import Tokenizer


class TokenLoader(Configurable):
    """Data loader whose global batch at step k is the same on any number of ranks.

    Sequence i of the global batch is the next sequence of stream i (modulo the number of streams). The ranks of a step
    split the sequences into contiguous slices, and the number of ranks may change at every step. `commit` with the sum
    of all ranks' `cursor_delta()` makes a step final; after `rollback`, `next_batches` returns the step again.

    One thread prefetches; `next_batches` raises the errors of the step it returns. `build` takes `tokenizer`,
    `seq_len` (tokens), `global_batch_size` and `local_batch_size` (sequences), and `seed`.
    """

    class Config(Configurable.Config):
        source: Source.Config
        """The source of the documents."""
        num_streams: int | None = None
        """Number of streams over which the documents are distributed; must divide the global batch size. None: the
        global batch size."""
        shuffle: bool = True
        """Shuffle the documents anew in every epoch; False keeps the order of the source."""
        infinite: bool = True
        """Repeat the data epoch after epoch; False ends after one epoch, with padding in the last sequences."""
        prefetch: int = 4
        """Number of steps prepared ahead in a background thread; 0 prepares each step in `next_batches`."""
        add_bos: bool = False
        """Add the BOS token of the tokenizer before each document."""
        add_eos: bool = False
        """Add the EOS token of the tokenizer after each document."""
        mtp: bool = False
        """Add `next_tokens` and `next_labels` to batches, for models with multi-token prediction (MTP)."""
        allow_changes: bool = False
        """Resume although the data or the settings differ from those of the saved state."""

        def validate(self) -> None:
            if self.num_streams is not None:
                _require_positive("num_streams", self.num_streams)
            if self.prefetch < 0:
                raise ValueError(f"prefetch must be at least 0 steps, got {self.prefetch}.")

        def batch_spec(self, *, seq_len: int, global_batch_size: int, local_batch_size: int) -> tuple[Batch, Tensor]:
            """Return a micro-batch and a `cursor_delta` on the meta device, with the shapes of the loader's.

            Sizes are in tokens (`seq_len`) and sequences. Reads no data.
            """
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
            raise ValueError("TokenLoader needs a tokenizer, got None. Set one, for example TiktokenTokenizer.")
        _require_positive("seq_len", seq_len)
        _require_positive("global_batch_size", global_batch_size)
        _require_positive("local_batch_size", local_batch_size)
        self._config = config
        self._tokenizer = tokenizer
        self._global_batch_size, self._micro_batch_size = global_batch_size, local_batch_size
        if global_batch_size % local_batch_size:
            raise ValueError(
                f"local_batch_size must divide global_batch_size ({global_batch_size} sequences), got "
                f"{local_batch_size}. Use one of: {_divisors(global_batch_size)}."
            )
        self._num_streams = config.num_streams or global_batch_size
        if global_batch_size % self._num_streams:
            raise ValueError(
                f"num_streams must divide global_batch_size ({global_batch_size} sequences), got {self._num_streams}. "
                f"Use one of: {_divisors(global_batch_size)}."
            )
        self._source: Source = config.source.build()
        bos_id = _special_id(tokenizer.bos_id, "bos") if config.add_bos else None
        eos_id = _special_id(tokenizer.eos_id, "eos") if config.add_eos else None
        self._packing = Packing(seq_len, bos_id, eos_id)
        self._order = Order(seed, config.shuffle, config.infinite)
        self._cursors = [Cursor(0, 0)] * self._num_streams
        self._share: Share | None = None
        self._streams: dict[int, SequenceStream] = {}
        self._prefetched: deque[Future[Step]] = deque()
        self._current_step: Step | None = None
        self._pool = ThreadPoolExecutor(1, "titan-data") if config.prefetch else _SameThreadExecutor()
        self._finalizer = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def next_batches(self, rank: int, num_ranks: int) -> list[Batch]:
        """Return the micro-batches of data rank `rank` for this step, each of `local_batch_size` sequences.

        All ranks get the same number of micro-batches: if the global batch does not split evenly (as when ranks join or
        leave), some ranks get one of padding. After the end of a finite loader the list is empty, on all ranks at the
        same step; until then a stream that has ended yields padding. Raises ValueError for a document without valid
        text, RuntimeError if the previous step was neither committed nor rolled back.
        """
        if self._current_step is not None:
            raise RuntimeError("The previous step must be finished before next_batches(). Call commit() or rollback().")
        share = self._new_share(rank, num_ranks)
        if all(cursor.tokens == ENDED for cursor in self._cursors):
            return []
        try:
            if share != self._share:
                self._take_over(share)
            if len(self._prefetched) <= self._config.prefetch // 2:  # submit several at once: fewer thread switches
                missing = self._config.prefetch + 1 - len(self._prefetched)
                self._prefetched += [self._pool.submit(make_step, self._streams, share) for _ in range(missing)]
            self._current_step = self._prefetched[0].result()
        except BaseException:
            self._forget()  # drops prefetched steps; the next call starts from the last commit
            raise
        batches = self._current_step.batches
        return [with_mtp_targets(batch) for batch in batches] if self._config.mtp else batches

    def cursor_delta(self) -> Tensor:
        """Return this rank's advance of each stream in the current step: int64 [streams, 2] (documents, tokens).

        It is 0 for streams that another rank owns, so that the sum over all ranks advances each stream once.
        """
        moves = self._moves_of_current_step()
        owned = [] if self._current_step is None else self._current_step.share.owned
        return torch.tensor([moves[index] if index in owned else (0, 0) for index in range(self._num_streams)])

    def commit(self, cursor_delta: Tensor) -> None:
        """Make the step final. `cursor_delta` is the sum of `cursor_delta()` over all ranks of the step.

        A rank that took no part in the step commits the sum of the other ranks. Raises ValueError if `cursor_delta`
        cannot be that sum.
        """
        moves = [(documents, tokens) for documents, tokens in cursor_delta.tolist()]
        self._check_moves(moves)
        if self._current_step is None:
            self._forget()
        else:
            self._prefetched.popleft()
            self._current_step = None
        self._cursors = [
            Cursor(cursor.documents + documents, cursor.tokens + tokens)
            for cursor, (documents, tokens) in zip(self._cursors, moves, strict=True)
        ]

    def rollback(self) -> None:
        """Discard the current step: `next_batches` will return the same sequences again."""
        self._current_step = None

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state as JSON values: two integers per stream, and the identity of the data."""
        cursors = self._cursors
        return {
            "documents": [cursor.documents for cursor in cursors],
            "tokens": [cursor.tokens for cursor in cursors],
            "identity": self.identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`, on any number of ranks.

        Raises ValueError for an invalid state and, unless `allow_changes` is set, for data or settings that differ from
        those of the saved state, listing each difference. The loader is unchanged after an error.
        """
        cursors, identity = cursors_in(state), self.identity()
        check_identity(state["identity"], identity, self._config.allow_changes)
        cursors = carried_over(cursors, state["identity"], identity)
        source, infinite = self._source, self._order.infinite
        check_range(cursors, len(source) if isinstance(source, MapSource) and not infinite else None)
        self._cursors = cursors
        self._forget()

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the sequences, as JSON values."""
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "source": self._source.identity(),
            "seq_len": self._packing.seq_len,
            "global_batch_size": self._global_batch_size,
            "num_streams": self._num_streams,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "infinite": self._order.infinite,
            "bos_id": self._packing.bos_id,
            "eos_id": self._packing.eos_id,
        }

    def close(self) -> None:
        """Stop the prefetch thread and wait for it. `next_batches` cannot be called afterwards."""
        self._finalizer.detach()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._forget()

    def _new_share(self, rank: int, num_ranks: int) -> Share:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be from 0 to {num_ranks - 1} ({num_ranks} ranks), got {rank}.")
        whole = self._global_batch_size // self._micro_batch_size
        begin, end = (place * whole // num_ranks * self._micro_batch_size for place in (rank, rank + 1))
        sizes = self._global_batch_size, self._num_streams, self._micro_batch_size
        return Share(begin, end, *sizes, num_micro=-(-whole // num_ranks), seq_len=self._packing.seq_len)

    def _take_over(self, share: Share) -> None:
        """Switch to the streams of `share`: streams already open keep their prefetched sequences, others are opened."""
        kept = self._streams
        steps = [future.result() for future in _stopped(self._prefetched)]
        for step in reversed(steps):
            for index, sequences in step.sequences.items():
                kept[index].give_back(sequences)
        self._share = share
        self._streams = {index: kept.get(index) or self._open(index) for index in share.read}

    def _open(self, index: int) -> SequenceStream:
        cursor = self._cursors[index]
        return SequenceStream(
            self._source, self._tokenizer, self._packing, self._order, index, self._num_streams, cursor
        )

    def _forget(self) -> None:
        """Drop everything that was read and not committed."""
        for future in self._prefetched:
            future.cancel()
        self._share, self._streams, self._prefetched, self._current_step = None, {}, deque(), None

    def _moves_of_current_step(self) -> dict[int, tuple[int, int]]:
        """Return the advance (documents, tokens) of each stream that this rank read in the current step."""
        moves = {}
        for index, sequences in ({} if self._current_step is None else self._current_step.sequences).items():
            before, after = self._cursors[index], sequences[-1].after
            moves[index] = (after.documents - before.documents, after.tokens - before.tokens)
        return moves

    def _check_moves(self, moves: list[tuple[int, int]]) -> None:
        still = [i for i, cursor in enumerate(self._cursors) if cursor.tokens != ENDED and not any(moves[i])]
        other = [i for i, move in self._moves_of_current_step().items() if moves[i] != move]
        if still or other:
            got = "no advance of" if still else "an advance that differs from that of this rank for"
            raise ValueError(
                "The argument of commit() must be the sum of cursor_delta() over all data ranks, got "
                f"{got} streams {still or other}."
            )


def _stopped(futures: deque[Future[Step]]) -> list[Future[Step]]:
    """Cancel the futures that have not started, last to first; return the others in order."""
    started = [future for future in reversed(futures) if not future.cancel()]
    futures.clear()
    return started[::-1]


class _SameThreadExecutor(Executor):
    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _special_id(number: int | None, name: str) -> int:
    if number is None:
        raise ValueError(
            f"add_{name} needs a tokenizer with a {name.upper()} token, got one without. "
            f"Set {name} of the tokenizer, or add_{name}=False."
        )
    return number


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
