"""A check anybody may run on their loader: the same rows on any ranks, given back, resumed, none lost or doubled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_data.batch import IGNORED_LABEL, PADDING_ID


class BatchLike(Protocol):
    """What the check reads of a batch: tokens, positions, document_ids and labels, [B, T], and the ids per row."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sample_ids: list[list[int]]


class Loader(Protocol):
    """The loader of docs/design.md, as the check uses it."""

    def next_batches(self, rank: int, num_ranks: int) -> Sequence[BatchLike]: ...
    def cursor_delta(self) -> Tensor: ...
    def commit(self, cursor_delta: Tensor) -> None: ...
    def rollback(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Rows = dict[str, Any]  # a global batch: [rows, T] tensors by name, and sample_ids, a list a row


def check_loader(
    make_loader: Callable[[], Loader],
    *,
    steps: int = 8,
    num_streams: int | None = None,
    document: Callable[[int], Sequence[int]] | None = None,
) -> None:
    """Raise AssertionError, saying what and where, unless the loader keeps its promises.

    make_loader: returns a new loader at its beginning, of at least 4 rows a step and micro-batches of one row.
    steps: how many are drawn; enough to pass the end of an epoch.
    num_streams: row i is of stream i mod this; None: as many as rows.
    document: the tokens of a document by its id; with it, what the rows say is compared with what it should be.
    """
    straight = _run(make_loader, [1] * steps)
    for counts in ([2] * steps, [4] * steps, [(1, 2, 4, 2)[step % 4] for step in range(steps)]):
        _require_equal(straight, _run(make_loader, counts), f"on {sorted(set(counts))} ranks")
    _check_rollback(make_loader, straight)
    _check_resume(make_loader, straight)
    _check_rows(straight, num_streams or len(straight[0]["sample_ids"]), document)


def global_batch(loaders: Sequence[Loader], num_ranks: int) -> Rows:
    """Draw one step on the first `num_ranks` loaders; return its rows in order. Empty after a finite loader's end."""
    batches = [batch for rank in range(num_ranks) for batch in loaders[rank].next_batches(rank, num_ranks)]
    if not batches:
        return {"sample_ids": []}
    tensors = [{**batch.inputs, **batch.targets} for batch in batches]
    rows: Rows = {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}
    return {**rows, "sample_ids": [ids for batch in batches for ids in batch.sample_ids]}


def commit(loaders: Sequence[Loader]) -> None:
    """Commit on all loaders the sum of what they drew, as ranks do after an all-reduce."""
    cursor_delta = torch.stack([loader.cursor_delta() for loader in loaders]).sum(0)
    for loader in loaders:
        loader.commit(cursor_delta)


def _run(make_loader: Callable[[], Loader], counts: Sequence[int], state: dict[str, Any] | None = None) -> list[Rows]:
    """Draw and commit a step for each of `counts`, on as many ranks; the other ranks commit what these drew."""
    loaders = [make_loader() for _ in range(max(counts))]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    steps = []
    for num_ranks in counts:
        steps.append(global_batch(loaders, num_ranks))
        commit(loaders)
    states = [json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders]
    assert len(set(states)) == 1, f"Ranks hold different states after {len(counts)} steps."
    return steps


def _check_rollback(make_loader: Callable[[], Loader], straight: list[Rows]) -> None:
    loaders = [make_loader(), make_loader()]
    for step, expected in enumerate(straight):
        before = json.dumps(loaders[0].state_dict())
        global_batch(loaders, 2)
        for loader in loaders:
            loader.rollback()
        assert json.dumps(loaders[0].state_dict()) == before, f"A step rolled back (step {step}) changed the state."
        _require_equal([expected], [global_batch(loaders, 2 - step % 2)], "after a rollback", first=step)
        commit(loaders)


def _check_resume(make_loader: Callable[[], Loader], straight: list[Rows]) -> None:
    loader = make_loader()
    for step in range(1, len(straight)):
        global_batch([loader], 1)
        commit([loader])
        state = json.loads(json.dumps(loader.state_dict()))
        num_ranks, left = (1, 2, 4)[step % 3], len(straight) - step
        resumed = _run(make_loader, [num_ranks] * left, state)
        _require_equal(straight[step:], resumed, f"resumed on {num_ranks} ranks", first=step)


def _require_equal(expected: list[Rows], found: list[Rows], when: str, first: int = 0) -> None:
    for step, (one, other) in enumerate(zip(expected, found, strict=True), start=first):
        for name in sorted(one.keys() | other.keys()):
            old, new = one.get(name), other.get(name)
            if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
                rows = (old != new).any(-1).nonzero().flatten().tolist()
                assert not rows, f"Step {step} {when}: {name} of rows {rows} differ from those drawn straight through."
            else:
                assert type(old) is type(new) and old == new, f"Step {step} {when}: {name} differs."


def _check_rows(steps: list[Rows], num_streams: int, document: Callable[[int], Sequence[int]] | None) -> None:
    for stream in range(num_streams):
        rows = [(step, row) for step in steps for row in range(stream, len(step["sample_ids"]), num_streams)]
        for step, row in rows:
            _check_row({name: step[name][row] for name in step}, f"stream {stream}")
        names = ("tokens", "labels", "document_ids")
        tokens, labels, ids = (torch.cat([step[name][row] for step, row in rows]).tolist() for name in names)
        _check_labels(tokens, labels, ids, f"Stream {stream}")
        if document is not None:
            _check_documents(tokens, labels, ids, range(stream, 1 << 62, num_streams), document)


def _check_row(row: Rows, where: str) -> None:
    ids = row["document_ids"].tolist()
    begins = [place for place in range(len(ids)) if place == 0 or ids[place] != ids[place - 1]]
    last_begins = [max(begin for begin in begins if begin <= place) for place in range(len(ids))]
    expected = [place - begin for place, begin in enumerate(last_begins)]
    assert row["positions"].tolist() == expected, f"A row of {where}: positions do not begin at 0 with each document."
    documents = [ids[begin] for begin in begins if ids[begin] != PADDING_ID]
    assert row["sample_ids"] == documents, f"A row of {where}: sample_ids {row['sample_ids']}, documents {documents}."


def _check_labels(tokens: list[int], labels: list[int], ids: list[int], where: str) -> None:
    """Check a stream's rows laid end to end: what follows in a document is the label, wherever rows end."""
    for begin, end in _runs(ids):
        following = [*tokens[begin + 1 : end], IGNORED_LABEL if end < len(ids) else labels[-1]]
        expected = [IGNORED_LABEL] * (end - begin) if ids[begin] == PADDING_ID else following
        found = labels[begin:end] == expected
        assert found, f"{where}: labels of document {ids[begin]} are not its next tokens, ended by -100."
    numbers = [ids[begin] for begin, _ in _runs(ids) if ids[begin] != PADDING_ID]
    assert len(set(numbers)) == len(numbers), f"{where}: a document comes a second time, among {numbers}."


def _check_documents(
    tokens: list[int], labels: list[int], ids: list[int], numbers: range, document: Callable[[int], Sequence[int]]
) -> None:
    """Check that the stream's documents come in order, each whole; only empty ones are passed over."""
    expected = iter(numbers)
    for begin, end in _runs(ids):
        if ids[begin] == PADDING_ID:
            continue
        number, whole = next((number, whole) for number in expected if (whole := list(document(number))))
        assert ids[begin] == number, f"Document {ids[begin]} comes where document {number} should."
        found, complete = tokens[begin:end], end < len(ids)
        assert found == (whole if complete else whole[: len(found)]), (
            f"Document {number} has other tokens than its own."
        )
        label = [*whole, IGNORED_LABEL][len(found)]
        assert labels[end - 1] == label, f"Document {number} has the label {labels[end - 1]} where {label} should be."


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """Return begin and end of each run of equal ids."""
    borders = [place for place in range(1, len(ids)) if ids[place] != ids[place - 1]]
    return list(zip([0, *borders], [*borders, len(ids)], strict=True))
