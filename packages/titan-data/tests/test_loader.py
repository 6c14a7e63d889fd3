from __future__ import annotations

import gc
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from titan_data import ByteTokenizer, HuggingFaceSource, JsonlSource, TextSource, TokenLoader, loader, packing, step
from titan_data.arrow_texts import ArrowTexts
from titan_data.testing import check_loader, commit, global_batch

TOKENIZER = ByteTokenizer.Config().build()
SIZES = {"seq_len": 24, "global_batch_size": 8, "local_batch_size": 1, "seed": 0}


@pytest.fixture(autouse=True)
def few_sequences_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack two sequences at a time, so that a short test covers several blocks."""
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 50)


@pytest.fixture
def source(texts: list[str], write_jsonl: Callable[..., Path]) -> JsonlSource.Config:
    return JsonlSource.Config(path=write_jsonl(texts))


def build(source: Any, tokenizer: Any = TOKENIZER, sizes: dict[str, int] = SIZES, **settings: Any) -> TokenLoader:
    return TokenLoader.Config(source=source, **settings).build(tokenizer=tokenizer, **sizes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefetch": 0},
        {"prefetch": 5, "add_bos": True, "add_eos": True},
        {"shuffle": False},
        {"infinite": False},
        {"num_streams": 4},
        {"num_streams": 1, "prefetch": 0},
    ],
    ids=str,
)
def test_token_loader_passes_check_loader(
    source: JsonlSource.Config, texts: list[str], settings: dict[str, Any]
) -> None:
    loaders = []

    def make() -> TokenLoader:
        loaders.append(build(source, **settings))
        return loaders[-1]

    def document(number: int) -> list[int]:
        ids = list(texts[number % len(texts)].encode())
        return [256, *ids, 257] if ids and settings.get("add_bos") else ids

    in_order = settings.get("shuffle") is False
    check_loader(
        make, steps=12, num_streams=settings.get("num_streams"), document=document if in_order else None
    )  # 12 steps are more than an epoch
    for each in loaders:
        each.close()


@pytest.mark.parametrize("num_files", [1, 3, 8])
def test_token_loader_with_a_streamed_source_passes_check_loader(
    texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path, num_files: int
) -> None:
    for number in range(num_files):
        write_jsonl([f"{number} {text}" for text in texts], f"part-{number}.jsonl")
    source = HuggingFaceSource.Config(path="json", data_files=str(tmp_path / "part-*.jsonl"), shuffle_buffer=5)
    check_loader(lambda: build(source, sizes={**SIZES, "global_batch_size": 4}, prefetch=1), steps=6)


def shift_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    make = step.make_step

    def shifted(*args: Any) -> Any:
        made = make(*args)
        for batch in made.batches:
            batch.targets["labels"] = batch.targets["labels"].roll(1, dims=1)
        return made

    monkeypatch.setattr(loader, "make_step", shifted)


def skip_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    owned = step.Share.read.fget

    def read(share: step.Share) -> list[int]:
        streams = owned(share)
        return streams if share.end - share.begin > 4 else streams[:1] + streams[:1] + streams[2:]

    def make_step(streams: dict[int, Any], share: step.Share) -> step.Step:
        streams = {index: streams.get(index) or next(iter(streams.values())) for index in owned(share)}
        return step.make_step(streams, share)

    monkeypatch.setattr(step.Share, "read", property(read))
    monkeypatch.setattr(loader, "make_step", make_step)


def lose_a_token_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing.SequenceStream._pack

    def losing(stream: packing.SequenceStream) -> list[packing.PackedSequence]:
        sequences = pack(stream)
        stream._tokens, stream._numbers = stream._tokens[1:], stream._numbers[1:]
        return sequences

    monkeypatch.setattr(packing.SequenceStream, "_pack", losing)


def lose_the_last_label_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    make = step.make_step

    def losing(*args: Any) -> Any:
        made = make(*args)
        for batch in made.batches:
            batch.targets["labels"][:, -1] = -100
        return made

    monkeypatch.setattr(loader, "make_step", losing)


def continue_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    make = step.make_step

    def without_restart(*args: Any) -> Any:
        made = make(*args)
        for batch in made.batches:
            batch.inputs["positions"] = torch.arange(24).expand_as(batch.inputs["positions"])
        return made

    monkeypatch.setattr(loader, "make_step", without_restart)


def forget_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    def rollback(self: TokenLoader) -> None:
        self._prefetched.popleft()
        self._current_step = None

    monkeypatch.setattr(TokenLoader, "rollback", rollback)


def save_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    state_dict = TokenLoader.state_dict
    monkeypatch.setattr(TokenLoader, "state_dict", lambda self: {**state_dict(self), "tokens": [0] * 8})


def lose_prefetched_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.SequenceStream, "give_back", lambda self, sequences: None)


BREAKS = {
    shift_labels: "labels of document",
    skip_a_stream: "on .* ranks: .* differ",
    lose_a_token_between_blocks: "differs from an uninterrupted run|labels of document",
    lose_the_last_label_of_a_sequence: "labels of document",
    continue_positions: "positions must start at 0",
    forget_a_rollback: "after a rollback",
    save_no_tokens: "resumed on .* ranks",
    lose_prefetched_sequences: r"on \[1, 2, 4\] ranks|cursor_delta",
}


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_check_loader_detects_broken_loaders(
    source: JsonlSource.Config, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    def check() -> None:
        check_loader(lambda: build(source, shuffle=False, prefetch=1), steps=6)

    check()
    break_it(monkeypatch)
    with pytest.raises((AssertionError, ValueError), match=BREAKS[break_it]):
        check()


@pytest.mark.parametrize("change", ["text", "skipped"])
def test_check_loader_compares_tokens_with_the_documents(
    source: JsonlSource.Config, texts: list[str], write_jsonl: Callable[..., Path], change: str
) -> None:
    other = [text[:-1] + "?" for text in texts] if change == "text" else [*texts[:5], "", *texts[6:]]
    broken = JsonlSource.Config(path=write_jsonl(other, "other.jsonl"))
    with pytest.raises(
        AssertionError,
        match=r"must have the tokens of document\(" if change == "text" else r"next document must be 5, got",
    ):
        check_loader(
            lambda: build(broken, shuffle=False),
            steps=3,
            document=lambda number: list(texts[number % len(texts)].encode()),
        )


def test_ranks_may_change_at_every_step_with_rollbacks_in_between(source: JsonlSource.Config) -> None:
    generator = np.random.default_rng(0)
    alone, loaders = build(source), [build(source) for _ in range(8)]
    for _ in range(30):
        expected = global_batch([alone], 1)
        commit([alone])
        for committed in (False, True):
            num_ranks = int(generator.choice([1, 2, 4, 8]))
            order = [loaders[index] for index in generator.permutation(8)]  # any loader may be any rank
            found = global_batch(order, num_ranks)
            assert found["sample_ids"] == expected["sample_ids"]
            for name in ("tokens", "positions", "document_ids", "labels"):
                assert torch.equal(found[name], expected[name])
            if committed:
                commit(order)
            else:
                for each in order:
                    each.rollback()
        assert loaders[3].state_dict() == alone.state_dict()


def test_the_state_is_two_integers_per_stream(source: JsonlSource.Config) -> None:
    loader = build(source)
    global_batch([loader], 1)
    before = loader.state_dict()
    assert (before["documents"], before["tokens"]) == ([0] * 8, [0] * 8)  # nothing is committed yet
    cursor_delta = loader.cursor_delta()
    assert (cursor_delta.shape, cursor_delta.dtype) == ((8, 2), torch.int64)
    loader.commit(cursor_delta)
    state = loader.state_dict()
    assert [state["documents"], state["tokens"]] == cursor_delta.T.tolist()
    assert set(state) == {"documents", "tokens", "identity"}
    assert json.loads(json.dumps(state)) == state


def test_the_cursor_delta_of_streams_of_other_ranks_is_zero(source: JsonlSource.Config) -> None:
    loader = build(source)
    loader.next_batches(1, 4)
    assert loader.cursor_delta().any(1).tolist() == [False, False, True, True, False, False, False, False]


def test_next_batches_twice_or_a_commit_of_one_rank_alone_is_an_error(source: JsonlSource.Config) -> None:
    loader = build(source)
    loader.next_batches(0, 2)
    with pytest.raises(RuntimeError, match=r"previous step must be finished .*commit\(\) or rollback\(\)"):
        loader.next_batches(0, 2)
    with pytest.raises(ValueError, match=r"must be the sum of cursor_delta.*got no advance of streams \[4, 5, 6, 7\]"):
        loader.commit(loader.cursor_delta())
    with pytest.raises(ValueError, match=r"an advance that differs from that of this rank for streams \[0, 1, 2, 3\]"):
        loader.commit(torch.full((8, 2), 1000))
    loader.rollback()
    assert len(loader.next_batches(0, 2)) == 4


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seq_len": ({"sizes": {**SIZES, "seq_len": 32}}, "seq_len: 24 -> 32"),
    "global batch": ({"sizes": {**SIZES, "global_batch_size": 16}, "num_streams": 8}, "global_batch_size: 8 -> 16"),
    "streams": ({"num_streams": 4}, "num_streams: 8 -> 4"),
    "seed": ({"sizes": {**SIZES, "seed": 1}}, "seed: 0 -> 1"),
    "shuffle": ({"shuffle": False}, "shuffle: True -> False"),
    "end": ({"infinite": False}, "infinite: True -> False"),
    "eos": ({"add_eos": True}, "eos_id: None -> 257"),
    "source": ({"source": "other"}, r"source\.bytes: \d+ -> \d+; source\.checksum: \w+ -> \w+"),
    "tokenizer": ({"tokenizer": "other"}, "tokenizer: ByteTokenizer -> Other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_other_settings_needs_allow_changes(
    change: str, source: JsonlSource.Config, texts: list[str], write_jsonl: Callable[..., Path]
) -> None:
    settings, message = dict(CHANGES[change][0]), CHANGES[change][1]
    if "source" in settings:
        settings["source"] = JsonlSource.Config(path=write_jsonl([f"{text} " for text in texts], "other.jsonl"))
    if "tokenizer" in settings:
        settings["tokenizer"] = ByteTokenizer.Config().build()
        settings["tokenizer"].fingerprint = "Other"
    saved = build(source)
    for _ in range(3):
        global_batch([saved], 1)
        commit([saved])
    state = saved.state_dict()
    with pytest.raises(ValueError, match=f"{message}.*allow_changes"):
        build(**{"source": source, **settings}).load_state_dict(state)
    changed = build(**{"source": source, **settings, "allow_changes": True})
    changed.load_state_dict(state)
    resumed = global_batch([changed], 1)
    assert min(ids[0] for ids in resumed["sample_ids"] if ids) >= min(
        index + documents * 8 for index, documents in enumerate(state["documents"])
    )


def test_a_changed_seq_len_or_batch_size_continues_at_the_same_token(source: JsonlSource.Config) -> None:
    saved = build(source)
    global_batch([saved], 1)
    commit([saved])
    state = saved.state_dict()
    following = global_batch([saved], 1)
    sizes = {**SIZES, "global_batch_size": 16, "seq_len": 12}
    changed = build(source, sizes=sizes, num_streams=8, allow_changes=True)
    changed.load_state_dict(state)
    tokens = global_batch([changed], 1)["tokens"]  # 16 sequences of half the length: two of each stream
    assert torch.equal(torch.cat([tokens[:8], tokens[8:]], dim=1), following["tokens"])


def test_a_changed_number_of_streams_continues_after_all_begun_documents(source: JsonlSource.Config) -> None:
    saved = build(source)
    seen: set[int] = set()
    for _ in range(4):
        seen.update(number for ids in global_batch([saved], 1)["sample_ids"] for number in ids)
        commit([saved])
    for batch_size in (4, 16):
        changed = build(source, sizes={**SIZES, "global_batch_size": batch_size}, allow_changes=True)
        changed.load_state_dict(saved.state_dict())
        first = [ids[0] for ids in global_batch([changed], 1)["sample_ids"]]
        assert min(first) > max(seen)
        assert max(seen) < min(first) <= max(seen) + 4  # the next non-empty document


@pytest.mark.parametrize(("num_ranks", "local_batch_size"), [(3, 1), (3, 2), (5, 2), (6, 4)])
def test_a_batch_that_the_ranks_do_not_divide_is_padded(
    source: JsonlSource.Config, num_ranks: int, local_batch_size: int
) -> None:
    sizes = {**SIZES, "local_batch_size": local_batch_size}
    whole, parts = build(source, sizes=sizes), [build(source, sizes=sizes) for _ in range(num_ranks)]
    for _ in range(3):
        expected = [tokens for batch in whole.next_batches(0, 1) for tokens in batch.inputs["tokens"].tolist()]
        by_rank = [loader.next_batches(rank, num_ranks) for rank, loader in enumerate(parts)]
        assert len({len(batches) for batches in by_rank}) == 1
        all_batches = [batch for batches in by_rank for batch in batches]
        filled = [batch for batch in all_batches if (batch.targets["labels"] != -100).any()]
        padding = [batch for batch in all_batches if not (batch.targets["labels"] != -100).any()]
        assert [tokens for batch in filled for tokens in batch.inputs["tokens"].tolist()] == expected
        assert all((batch.inputs["document_ids"] == -1).all() for batch in padding)
        commit([whole])
        commit(parts)
    assert all(loader.state_dict() == whole.state_dict() for loader in parts)


def test_a_loader_without_a_tokenizer_is_an_error(source: JsonlSource.Config) -> None:
    with pytest.raises(ValueError, match="TokenLoader needs a tokenizer, got None"):
        build(source, tokenizer=None)


def test_batch_sizes_that_do_not_fit_are_errors(source: JsonlSource.Config) -> None:
    with pytest.raises(ValueError, match=r"local_batch_size must divide .*\(8 sequences\), got 3\..*1, 2, 4, 8"):
        build(source, sizes={**SIZES, "local_batch_size": 3})
    with pytest.raises(ValueError, match=r"rank must be from 0 to 1 \(2 ranks\), got 2"):
        build(source).next_batches(2, 2)
    with pytest.raises(ValueError, match=r"num_streams must divide .*\(8 sequences\), got 3\..*1, 2, 4, 8"):
        build(source, num_streams=3)
    for name in ("seq_len", "global_batch_size", "local_batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            build(source, sizes={**SIZES, name: 0})
    with pytest.raises(ValueError, match="num_streams must be at least 1, got 0"):
        build(source, num_streams=0)
    with pytest.raises(ValueError, match="prefetch must be at least 0 steps, got -1"):
        build(source, prefetch=-1)


def test_add_bos_and_add_eos_need_a_tokenizer_with_these_tokens(source: JsonlSource.Config) -> None:
    class Bare(ByteTokenizer):
        bos_id = None
        eos_id = None

    for name in ("bos", "eos"):
        with pytest.raises(ValueError, match=f"add_{name} needs a tokenizer with a {name.upper()} token, got one with"):
            build(source, tokenizer=Bare.Config().build(), **{f"add_{name}": True})


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_prefetch_error_is_raised_by_next_batches(tmp_path: Path, prefetch: int) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"text"\n')
    loader = build(JsonlSource.Config(path=path, check=False), prefetch=prefetch)
    for _ in range(2):  # every call fails
        with pytest.raises(ValueError, match=r"texts\.jsonl, line 2 must be a JSON object"):
            loader.next_batches(0, 1)
    loader.close()


def test_steps_before_a_bad_document_are_returned(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl(["a" * 3000, "b"])
    path.write_text(path.read_text() + "no json\n")
    sizes = {"seq_len": 1024, "global_batch_size": 1, "local_batch_size": 1, "seed": 0}
    loader = build(JsonlSource.Config(path=path, check=False), sizes=sizes, shuffle=False, prefetch=1)
    assert loader.next_batches(0, 1)[0].inputs["tokens"].tolist() == [[97] * 1024]


@pytest.mark.parametrize("end", ["close", "garbage collection"])
def test_no_thread_is_left_behind(source: JsonlSource.Config, end: str) -> None:
    before = set(threading.enumerate())
    loader = build(source)
    loader.next_batches(0, 1)
    (thread,) = set(threading.enumerate()) - before
    if end == "close":
        loader.close()
    del loader
    gc.collect()
    thread.join(timeout=600)
    assert not thread.is_alive()


def test_prefetch_prepares_steps_in_a_thread_and_zero_does_not(
    source: JsonlSource.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = step.make_step
    monkeypatch.setattr(loader, "make_step", lambda *args: made.append(threading.current_thread().name) or make(*args))
    ahead = build(source, prefetch=3)
    ahead.next_batches(0, 1)
    ahead.close()  # waits for the thread
    assert 1 <= len(made) <= 4
    assert all(name.startswith("titan-data") for name in made)
    made.clear()
    build(source, prefetch=0).next_batches(0, 1)
    assert made == [threading.current_thread().name]


def test_a_document_longer_than_a_step_continues_in_the_next(tmp_path: Path) -> None:
    words = [f"word{number} " for number in range(30_000)]
    (tmp_path / "one.txt").write_text("".join(words))
    config = TextSource.Config(path=tmp_path / "one.txt")
    sizes = {"seq_len": 1000, "global_batch_size": 1, "local_batch_size": 1, "seed": 0}
    loader = build(config, sizes=sizes, infinite=False)
    tokens = []
    while batches := loader.next_batches(0, 1):
        tokens += batches[0].inputs["tokens"][batches[0].inputs["document_ids"] == 0].tolist()
        assert int(batches[0].inputs["positions"].max()) < 1000
        loader.commit(loader.cursor_delta())
    assert TOKENIZER.decode(tokens) == "".join(words)


def test_streams_of_a_downloaded_dataset_read_only_their_own_documents(
    tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 of 2048 streams, 8 files: a rank reads only the documents that its own sequences contain in part or whole."""
    generator = random.Random(0)
    for number in range(8):
        write_jsonl(["x" * generator.randrange(100, 3000) for _ in range(1500)], f"part-{number}.jsonl")
    files, cache = str(tmp_path / "part-*.jsonl"), tmp_path / "cache"
    source = HuggingFaceSource.Config(path="json", data_files=files, streaming=False, cache_dir=cache)
    loader = TokenLoader.Config(source=source, shuffle=False, infinite=False, prefetch=0).build(
        tokenizer=ByteTokenizer.Config().build(), seq_len=512, global_batch_size=2048, local_batch_size=8, seed=0
    )
    num_bytes = []
    text = ArrowTexts.text

    def counted(self: ArrowTexts, index: int) -> str:
        num_bytes.append(len(text(self, index)))
        return text(self, index)

    monkeypatch.setattr(ArrowTexts, "text", counted)
    given = sum(batch.inputs["tokens"].numel() for batch in loader.next_batches(1, 4))
    assert given == 512 * 512
    assert sum(num_bytes) < given + 512 * 3000
