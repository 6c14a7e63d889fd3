"""The saved state of a loader is validated before it is used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from titan_data import ByteTokenizer, JsonlSource, TokenLoader
from titan_data.testing import commit, global_batch


def build(path: Path, **settings: Any) -> TokenLoader:
    sizes = {"seq_len": 8, "global_batch_size": 4, "local_batch_size": 1, "seed": 0}
    config = TokenLoader.Config(source=JsonlSource.Config(path=path), **settings)
    return config.build(tokenizer=ByteTokenizer.Config().build(), **sizes)


def changed(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, **entries}


CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative": (changed(documents=[0, -1, 0, 0]), r"documents\[1\] must be an integer of at least 0 .*got -1"),
    "negative tokens": (changed(tokens=[0, 0, -2, 0]), r"tokens\[2\] must be an integer .*got -2"),
    "ended, but endless": (changed(tokens=[-1, 0, 0, 0]), r"tokens\[0\] must be an integer of at least 0"),
    "NaN": (changed(tokens=[float("nan"), 0, 0, 0]), r"tokens\[0\] must be an integer .*got nan"),
    "a float": (changed(documents=[1.0, 0, 0, 0]), r"documents\[0\] must be an integer .*got 1\.0"),
    "a boolean": (changed(documents=[0, 0, 0, True]), r"documents\[3\] must be an integer .*got True"),
    "a string": (changed(documents=["1", 0, 0, 0]), r"documents\[0\] must be an integer"),
    "null": (changed(documents=None), r"documents must be a list of 4 integers, one per stream, got NoneType"),
    "too short": (changed(tokens=[0, 0, 0]), r"tokens must be a list of 4 integers, one per stream, got 3 values"),
    "too long": (changed(documents=[0] * 5), r"documents must be a list of 4 integers"),
    "beyond 64 bits": (changed(documents=[1 << 62, 0, 0, 0]), r"documents\[0\] must be an integer .* below 2\^62"),
    "beyond the order": (changed(documents=[1 << 61, 0, 0, 0]), r"documents\[0\] must be at most"),
    "5,000 digits": (changed(documents=[10**5000, 0, 0, 0]), r"got an integer beyond 64 bits"),
    "an unknown key": (
        changed(more=1),
        r"must have the keys documents, tokens, identity, got \['documents', 'id",
    ),
    "a missing key": (
        lambda state: {"documents": [0] * 4, "tokens": [0] * 4},
        "must have the keys documents, tokens, identity",
    ),
    "a list": (lambda state: [state], "must have the keys documents, tokens, identity, got list"),
    "identity": (changed(identity=[]), "identity must be a dictionary, got list"),
    "no streams": (lambda state: changed(identity={**state["identity"], "num_streams": 0})(state), "identity.num_str"),
    "true streams": (lambda s: changed(identity={**s["identity"], "num_streams": True})(s), r"num_streams .*got True"),
    "infinite": (lambda s: changed(identity={**s["identity"], "infinite": 1})(s), r"identity.infinite must be true or"),
}


@pytest.mark.parametrize("allow_changes", [False, True])
def test_an_invalid_state_is_an_error_and_leaves_the_loader_unchanged(
    allow_changes: bool, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl([f"document number {number}" for number in range(40)])
    loader, reference = build(path, allow_changes=allow_changes), build(path)
    for each in (loader, reference):
        global_batch([each], 1)
        commit([each])
    state = loader.state_dict()
    for change, message in CASES.values():
        with pytest.raises(ValueError, match=f"saved state of the data loader cannot be resumed: .*{message}"):
            loader.load_state_dict(change(copy.deepcopy(state)))
    assert loader.state_dict() == state
    assert torch.equal(global_batch([loader], 1)["tokens"], global_batch([reference], 1)["tokens"])


def test_a_position_beyond_the_end_of_a_finite_loader_is_an_error(write_jsonl: Callable[..., Path]) -> None:
    loader = build(write_jsonl([f"document {number}" for number in range(10)]), infinite=False)
    while global_batch([loader], 1)["sample_ids"]:
        commit([loader])
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["documents"] == [3, 3, 2, 2] and state["tokens"] == [-1] * 4
    loader.load_state_dict(state)
    assert not global_batch([loader], 1)["sample_ids"]
    with pytest.raises(ValueError, match=r"documents\[2\] must be at most 2, got 3"):
        loader.load_state_dict(state | {"documents": [3, 3, 3, 2]})
