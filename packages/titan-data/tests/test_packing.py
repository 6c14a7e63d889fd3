"""Packed sequences against a plain Python reference: tokenize, concatenate, slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from titan_data import Batch, ByteTokenizer, JsonlSource, TiktokenTokenizer, Tokenizer, TokenLoader, packing

NO_LABEL, NO_DOCUMENT = -100, -1


def reference_sequence(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    stream: int,
    num_streams: int,
    index: int,
    length: int,
    epochs: int,
) -> dict[str, list[int]]:
    """Return sequence `index` of a stream over `epochs` epochs of `texts` in order."""
    tokens, labels, ids = [], [], []
    for position in range(stream, len(texts) * epochs, num_streams):
        text = texts[position % len(texts)]
        if text:
            document = encode(text)
            tokens += document
            labels += [*document[1:], NO_LABEL]
            ids += [position] * len(document)
    begin, end = index * length, (index + 1) * length
    tokens, labels, ids = tokens[begin:end], labels[begin:end], ids[begin:end]
    missing = length - len(tokens)
    tokens, labels, ids = tokens + [0] * missing, labels + [NO_LABEL] * missing, ids + [NO_DOCUMENT] * missing
    positions = [place - ids.index(number) for place, number in enumerate(ids)]
    sample_ids = sorted(set(ids) - {NO_DOCUMENT})
    return {"tokens": tokens, "positions": positions, "document_ids": ids, "labels": labels, "sample_ids": sample_ids}


def sequences_of(batch: Batch) -> list[dict[str, list[int]]]:
    tensors = {**batch.inputs, **batch.targets}
    return [
        {**{name: tensor[index].tolist() for name, tensor in tensors.items()}, "sample_ids": ids}
        for index, ids in enumerate(batch.sample_ids)
    ]


def steps_of(loader: TokenLoader, steps: int) -> list[list[Batch]]:
    result = []
    for _ in range(steps):
        result.append(loader.next_batches(0, 1))
        loader.commit(loader.cursor_delta())
    return result


@pytest.fixture(params=["bytes", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, ranks_file: Path) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer.Config().build()
    specials = {"<s>": 272, "</s>": 273}
    return TiktokenTokenizer.Config(path=ranks_file, special_tokens=specials, bos="<s>", eos="</s>").build()


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("batch_size", "num_streams", "length"), [(4, 4, 16), (4, 2, 7), (3, 1, 1), (2, 2, 100)])
@pytest.mark.parametrize("block_tokens", [1, 50, 2048])  # the block size must not change the result
def test_sequences_match_the_reference(
    texts: list[str],
    write_jsonl: Callable[..., Path],
    tokenizer: Tokenizer,
    add_bos: bool,
    add_eos: bool,
    batch_size: int,
    num_streams: int,
    length: int,
    block_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "BLOCK_TOKENS", block_tokens)

    def encode(text: str) -> list[int]:
        before = [tokenizer.bos_id] if add_bos else []
        return [*before, *tokenizer.encode(text).tolist(), *([tokenizer.eos_id] if add_eos else [])]

    source = JsonlSource.Config(path=write_jsonl(texts))
    config = TokenLoader.Config(source=source, shuffle=False, num_streams=num_streams, add_bos=add_bos, add_eos=add_eos)
    batch_sizes = {"global_batch_size": batch_size, "local_batch_size": batch_size}
    loader = config.build(tokenizer=tokenizer, seq_len=length, seed=0, **batch_sizes)
    for step, (batch,) in enumerate(steps_of(loader, 25)):
        for place, found in enumerate(sequences_of(batch)):
            index = step * (batch_size // num_streams) + place // num_streams
            expected = reference_sequence(texts, encode, place % num_streams, num_streams, index, length, epochs=16)
            assert found == expected, f"sequence {place} of step {step}"


@pytest.mark.parametrize("num_streams", [2, 4, 30])
def test_a_finite_loader_ends_after_one_epoch_with_padding(
    texts: list[str], write_jsonl: Callable[..., Path], num_streams: int
) -> None:
    tokenizer = ByteTokenizer.Config().build()
    source = JsonlSource.Config(path=write_jsonl(texts))
    config = TokenLoader.Config(source=source, shuffle=False, infinite=False, num_streams=num_streams)
    loader = config.build(tokenizer=tokenizer, seq_len=32, global_batch_size=num_streams, local_batch_size=1, seed=0)
    steps = []
    while batches := loader.next_batches(0, 1):
        steps.append([sequence for batch in batches for sequence in sequences_of(batch)])
        loader.commit(loader.cursor_delta())
    longest = max(sum(len(text.encode()) for text in texts[stream::num_streams]) for stream in range(num_streams))
    assert len(steps) == -(-longest // 32)
    for step, sequences in enumerate(steps):
        for stream, found in enumerate(sequences):
            expected = reference_sequence(texts, lambda text: [*text.encode()], stream, num_streams, step, 32, epochs=1)
            assert found == expected
    assert loader.next_batches(0, 1) == []
    assert not loader.cursor_delta().any()
    loader.load_state_dict(loader.state_dict())
    assert loader.next_batches(0, 1) == []


def test_sequences_of_many_epochs_match_the_reference(texts: list[str], write_jsonl: Callable[..., Path]) -> None:
    config = TokenLoader.Config(source=JsonlSource.Config(path=write_jsonl(texts)), shuffle=False)
    sizes = {"seq_len": 64, "global_batch_size": 2, "local_batch_size": 2}
    loader = config.build(tokenizer=ByteTokenizer.Config().build(), seed=0, **sizes)
    found = [sequence for (batch,) in steps_of(loader, 150) for sequence in sequences_of(batch)][::2]
    for index in (0, 31, 32, 63, 64, 100, 149):  # 32 sequences are packed at once
        assert found[index] == reference_sequence(texts, lambda text: list(text.encode()), 0, 2, index, 64, epochs=40)


def test_a_shuffled_epoch_holds_each_text_once(texts: list[str], write_jsonl: Callable[..., Path]) -> None:
    tokenizer = ByteTokenizer.Config().build()
    config = TokenLoader.Config(source=JsonlSource.Config(path=write_jsonl(texts)), infinite=False)
    loader = config.build(tokenizer=tokenizer, seq_len=16, global_batch_size=4, local_batch_size=4, seed=0)
    documents: dict[int, list[int]] = {}
    while batches := loader.next_batches(0, 1):
        for sequence in sequences_of(batches[0]):
            for token, number in zip(sequence["tokens"], sequence["document_ids"], strict=True):
                documents.setdefault(number, []).append(token)
        loader.commit(loader.cursor_delta())
    documents.pop(NO_DOCUMENT)
    assert sorted(tokenizer.decode(tokens) for tokens in documents.values()) == sorted(text for text in texts if text)


def test_a_batch_has_inputs_targets_and_sequence_dims(texts: list[str], write_jsonl: Callable[..., Path]) -> None:
    config = TokenLoader.Config(source=JsonlSource.Config(path=write_jsonl(texts)))
    sizes = {"seq_len": 16, "global_batch_size": 6, "local_batch_size": 3}
    batches = config.build(tokenizer=ByteTokenizer.Config().build(), seed=0, **sizes).next_batches(0, 1)
    assert len(batches) == 2
    for batch in batches:
        assert list(batch.inputs) == ["tokens", "positions", "document_ids"]
        assert list(batch.targets) == ["labels"]
        assert batch.sequence_dims == {"tokens": 1, "positions": 1, "document_ids": 1, "labels": 1}
        for tensor in [*batch.inputs.values(), *batch.targets.values()]:
            assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 16), torch.int64, True)


def test_an_error_of_the_tokenizer_names_the_document(write_jsonl: Callable[..., Path]) -> None:
    class Strict(ByteTokenizer):
        def encode(self, text: str):
            if "bad" in text:
                raise ValueError("The text must not contain bad.")
            return super().encode(text)

    config = TokenLoader.Config(source=JsonlSource.Config(path=write_jsonl(["fine", "bad"])), shuffle=False)
    loader = config.build(tokenizer=Strict.Config().build(), seq_len=4, global_batch_size=1, local_batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 2 cannot be encoded\. The text must not contain bad"):
        steps_of(loader, 2)
