"""Batches for multi-token prediction (MTP), checked token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from titan_data import ByteTokenizer, JsonlSource, TokenLoader
from titan_data.testing import commit

SIZES: dict[str, int] = {"seq_len": 24, "global_batch_size": 4, "local_batch_size": 2}


@pytest.fixture
def config(texts: list[str], write_jsonl: Callable[..., Path]) -> TokenLoader.Config:
    return TokenLoader.Config(source=JsonlSource.Config(path=write_jsonl(texts)), infinite=False, mtp=True)


def build(config: TokenLoader.Config) -> TokenLoader:
    return config.build(tokenizer=ByteTokenizer.Config().build(), seed=0, **SIZES)


def test_next_tokens_and_next_labels_are_those_of_the_same_document(config: TokenLoader.Config) -> None:
    loader = build(config)
    checked = 0
    while batches := loader.next_batches(0, 1):
        for batch in batches:
            tokens, documents = batch.inputs["tokens"].tolist(), batch.inputs["document_ids"].tolist()
            labels = batch.targets["labels"].tolist()
            for index in range(len(tokens)):
                for place in range(24):
                    label, after = labels[index][place], place + 1
                    if label == -100:
                        assert batch.targets["next_labels"][index, place] == -100
                        continue
                    assert batch.inputs["next_tokens"][index, place] == label
                    same = after < 24 and documents[index][after] == documents[index][place]
                    assert not same or tokens[index][after] == label
                    assert batch.targets["next_labels"][index, place] == (labels[index][after] if same else -100)
                    checked += same
        commit([loader])
    assert checked > 100


def test_mtp_changes_no_other_tensor(config: TokenLoader.Config) -> None:
    whole = build(config)
    plain = TokenLoader.Config(source=config.source, infinite=False)
    (batch, *_), (other, *_) = whole.next_batches(0, 1), build(plain).next_batches(0, 1)
    for name, tensor in other.inputs.items():
        assert torch.equal(batch.inputs[name], tensor)
    assert batch.sequence_dims == other.sequence_dims | {"next_tokens": 1, "next_labels": 1}


def test_batch_spec_has_the_shapes_of_the_batches(config: TokenLoader.Config) -> None:
    batch_spec, _ = config.batch_spec(**SIZES)
    batch = build(config).next_batches(0, 1)[0]

    def shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    assert shapes(batch_spec.inputs) == shapes(batch.inputs)
    assert shapes(batch_spec.targets) == shapes(batch.targets)
    assert batch_spec.sequence_dims == batch.sequence_dims
