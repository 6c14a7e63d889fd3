"""Conformance check for data loaders: same sequences on any number of ranks, rollback, resumption, no lost token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_data.batch import IGNORED_LABEL, PADDING_ID

__all__ = ["check_loader", "commit", "global_batch"]


class BatchLike(Protocol):
    """The attributes of a batch that the check reads.

    Tensors tokens, positions, document_ids and labels, each [B, T], and the document ids of each sequence.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sample_ids: list[list[int]]


class Loader(Protocol):
    """The part of the loader protocol (docs/concepts/design.md) that the check uses."""

    def next_batches(self, rank: int, num_ranks: int) -> Sequence[BatchLike]: ...
    def cursor_delta(self) -> Tensor: ...
    def commit(self, cursor_delta: Tensor) -> None: ...
    def rollback(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


GlobalBatch = dict[str, Any]  # name -> tensor [sequences, T]; sample_ids: one list per sequence


def check_loader(
    make_loader: Callable[[], Loader],
    *,
    steps: int = 8,
    num_streams: int | None = None,
    document: Callable[[int], Sequence[int]] | None = None,
) -> None:
    """Raise AssertionError, naming the step and the tensor, if a loader violates the loader protocol.

    Checks that the global batches do not depend on the number of ranks, that a step is the same after `rollback`, that
    a resumed loader continues exactly, and that no token is lost or repeated.

    make_loader: returns a new loader with at least 4 sequences per step and micro-batches of one sequence.
    steps: number of steps to check; choose enough to pass the end of an epoch.
    num_streams: sequence i belongs to stream i mod `num_streams`; None: the number of sequences per step.
    document: returns the tokens of a document by its id; if given, the tokens of all documents are compared with it.
    """
    reference = _run(make_loader, [1] * steps)
    for counts in ([2] * steps, [4] * steps, [(1, 2, 4, 2)[step % 4] for step in range(steps)]):
        _require_equal(reference, _run(make_loader, counts), f"on {sorted(set(counts))} ranks")
    _check_rollback(make_loader, reference)
    _check_resume(make_loader, reference)
    _check_sequences(reference, num_streams or len(reference[0]["sample_ids"]), document)


def global_batch(loaders: Sequence[Loader], num_ranks: int) -> GlobalBatch:
    """Return the next global batch of the first `num_ranks` loaders, its sequences in order.

    After the end of a finite loader, `sample_ids` is empty and there are no tensors.
    """
    batches = [batch for rank in range(num_ranks) for batch in loaders[rank].next_batches(rank, num_ranks)]
    if not batches:
        return {"sample_ids": []}
    tensors = [{**batch.inputs, **batch.targets} for batch in batches]
    joined: GlobalBatch = {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}
    return {**joined, "sample_ids": [ids for batch in batches for ids in batch.sample_ids]}


def commit(loaders: Sequence[Loader]) -> None:
    """Commit the sum of all cursor deltas on all loaders, as ranks do after an all-reduce."""
    cursor_delta = torch.stack([loader.cursor_delta() for loader in loaders]).sum(0)
    for loader in loaders:
        loader.commit(cursor_delta)


def _run(
    make_loader: Callable[[], Loader], counts: Sequence[int], state: dict[str, Any] | None = None
) -> list[GlobalBatch]:
    """Read and commit one step per entry of `counts`, on that number of ranks; all other ranks commit the step too."""
    loaders = [make_loader() for _ in range(max(counts))]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    steps = []
    for num_ranks in counts:
        steps.append(global_batch(loaders, num_ranks))
        commit(loaders)
    states = [json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders]
    assert len(set(states)) == 1, f"state_dict() differs between ranks after {len(counts)} steps."
    return steps


def _check_rollback(make_loader: Callable[[], Loader], reference: list[GlobalBatch]) -> None:
    loaders = [make_loader(), make_loader()]
    for step, expected in enumerate(reference):
        before = json.dumps(loaders[0].state_dict())
        global_batch(loaders, 2)
        for loader in loaders:
            loader.rollback()
        assert json.dumps(loaders[0].state_dict()) == before, f"rollback() of step {step} changed the state."
        _require_equal([expected], [global_batch(loaders, 2 - step % 2)], "after a rollback", first=step)
        commit(loaders)


def _check_resume(make_loader: Callable[[], Loader], reference: list[GlobalBatch]) -> None:
    loader = make_loader()
    for step in range(1, len(reference)):
        global_batch([loader], 1)
        commit([loader])
        state = json.loads(json.dumps(loader.state_dict()))
        num_ranks, left = (1, 2, 4)[step % 3], len(reference) - step
        resumed = _run(make_loader, [num_ranks] * left, state)
        _require_equal(reference[step:], resumed, f"resumed on {num_ranks} ranks", first=step)


def _require_equal(expected: list[GlobalBatch], found: list[GlobalBatch], when: str, first: int = 0) -> None:
    for step, (one, other) in enumerate(zip(expected, found, strict=True), start=first):
        for name in sorted(one.keys() | other.keys()):
            old, new = one.get(name), other.get(name)
            if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
                differing = (old != new).any(-1).nonzero().flatten().tolist()
                assert not differing, (
                    f"Step {step} {when}: {name} of sequences {differing} differs from an uninterrupted run on 1 rank."
                )
            else:
                assert type(old) is type(new) and old == new, f"Step {step} {when}: {name} differs."


def _check_sequences(
    steps: list[GlobalBatch], num_streams: int, document: Callable[[int], Sequence[int]] | None
) -> None:
    for stream in range(num_streams):
        places = [(step, index) for step in steps for index in range(stream, len(step["sample_ids"]), num_streams)]
        for step, index in places:
            _check_sequence({name: step[name][index] for name in step}, f"stream {stream}")
        names = ("tokens", "labels", "document_ids")
        tokens, labels, ids = (torch.cat([step[name][index] for step, index in places]).tolist() for name in names)
        _check_labels(tokens, labels, ids, f"Stream {stream}")
        if document is not None:
            _check_documents(tokens, labels, ids, range(stream, 1 << 62, num_streams), document)


def _check_sequence(sequence: dict[str, Any], where: str) -> None:
    ids = sequence["document_ids"].tolist()
    begins = [place for place in range(len(ids)) if place == 0 or ids[place] != ids[place - 1]]
    last_begins = [max(begin for begin in begins if begin <= place) for place in range(len(ids))]
    expected = [place - begin for place, begin in enumerate(last_begins)]
    assert sequence["positions"].tolist() == expected, (
        f"A sequence of {where}: positions must start at 0 in each document, got {sequence['positions'].tolist()}."
    )
    documents = [ids[begin] for begin in begins if ids[begin] != PADDING_ID]
    found = sequence["sample_ids"]
    assert found == documents, f"A sequence of {where}: sample_ids must be {documents}, got {found}."


def _check_labels(tokens: list[int], labels: list[int], ids: list[int], where: str) -> None:
    """Check over the concatenated sequences of a stream that each label is the next token of the same document."""
    for begin, end in _runs(ids):
        following = [*tokens[begin + 1 : end], IGNORED_LABEL if end < len(ids) else labels[-1]]
        expected = [IGNORED_LABEL] * (end - begin) if ids[begin] == PADDING_ID else following
        found = labels[begin:end] == expected
        assert found, f"{where}: labels of document {ids[begin]} must be its next tokens, then -100."
    numbers = [ids[begin] for begin, _ in _runs(ids) if ids[begin] != PADDING_ID]
    assert len(set(numbers)) == len(numbers), f"{where}: document ids must be unique, got {numbers}."


def _check_documents(
    tokens: list[int], labels: list[int], ids: list[int], numbers: range, document: Callable[[int], Sequence[int]]
) -> None:
    """Check that the documents of a stream are complete and in order; only empty ones may be skipped."""
    expected = iter(numbers)
    for begin, end in _runs(ids):
        if ids[begin] == PADDING_ID:
            continue
        number, whole = next((number, whole) for number in expected if (whole := list(document(number))))
        assert ids[begin] == number, f"The next document must be {number}, got {ids[begin]}."
        found, complete = tokens[begin:end], end < len(ids)
        assert found == (whole if complete else whole[: len(found)]), (
            f"Document {number} must have the tokens of document({number}), got others."
        )
        label = [*whole, IGNORED_LABEL][len(found)]
        assert labels[end - 1] == label, f"The last label of document {number} must be {label}, got {labels[end - 1]}."


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """Return the begin and end (exclusive) of each run of equal ids."""
    borders = [place for place in range(1, len(ids)) if ids[place] != ids[place - 1]]
    return list(zip([0, *borders], [*borders, len(ids)], strict=True))
