from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from titan_data import HuggingFaceSource, JsonlSource, ParquetSource, Source, TextSource
from titan_data.order import Order

STRAIGHT = Order(seed=0, shuffle=False, infinite=False)


def read(source: Source, order: Order = STRAIGHT, index: int = 0, num_streams: int = 1, start: int = 0) -> list[str]:
    return [document.text for document in source.stream(index, num_streams, start, order)]


@pytest.fixture(params=["jsonl", "parquet", "text", "hf map", "hf stream", "hf stream of 3 shards"])
def source(
    request: pytest.FixtureRequest, texts: list[str], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> Source:
    """A source of each kind with the documents `texts`."""
    kind: str = request.param
    if kind == "jsonl":
        return JsonlSource.Config(path=write_jsonl(texts)).build()
    if kind == "text":
        (tmp_path / "texts.txt").write_text("\n--\n".join(texts), encoding="utf-8")
        return TextSource.Config(path=tmp_path / "texts.txt", separator="\n--\n").build()
    if kind == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"n": list(range(len(texts))), "text": texts}), tmp_path / "texts.parquet"
        )
        return ParquetSource.Config(path=tmp_path / "texts.parquet", cache_dir=tmp_path / "cache").build()
    num_files = 3 if "shards" in kind else 1
    size = -(-len(texts) // num_files)
    for number in range(num_files):
        write_jsonl(texts[number * size : (number + 1) * size], f"part-{number}.jsonl")
    files, streaming = str(tmp_path / "part-*.jsonl"), "stream" in kind
    config = HuggingFaceSource.Config(path="json", data_files=files, streaming=streaming, cache_dir=tmp_path / "cache")
    return config.build()


def test_every_source_reads_the_texts_in_order(source: Source, texts: list[str]) -> None:
    assert read(source) == texts


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_streams", [2, 3, 8, 30])
def test_streams_together_read_each_document_once_per_epoch(
    source: Source, texts: list[str], num_streams: int, shuffle: bool
) -> None:
    order = Order(seed=1, shuffle=shuffle, infinite=False)
    streams = [read(source, order, index, num_streams) for index in range(num_streams)]
    assert sorted(itertools.chain(*streams)) == sorted(texts)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_opened_at_an_offset_continues_the_same_order(source: Source, shuffle: bool) -> None:
    def begin(start: int, count: int) -> list[str]:
        stream = source.stream(1, 2, start, Order(seed=1, shuffle=shuffle, infinite=True))
        return [document.text for document in itertools.islice(stream, count)]

    whole = begin(0, 40)  # two epochs and more
    for start in (1, 9, 10, 25):
        assert begin(start, 40 - start) == whole[start:]


def test_every_epoch_is_shuffled_differently(source: Source, texts: list[str]) -> None:
    stream = source.stream(0, 1, 0, Order(seed=1, shuffle=True, infinite=True))
    epochs = [[document.text for document in itertools.islice(stream, len(texts))] for _ in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, texts]}) == 4
    assert read(source, Order(seed=2, shuffle=True, infinite=False)) not in epochs


def test_place_names_the_file(source: Source) -> None:
    document = next(iter(source.stream(0, 1, 0, STRAIGHT)))
    assert any(name in document.place() for name in ("texts.", "json train"))


def test_each_stream_reads_only_its_own_shards(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    for number in range(4):
        write_jsonl([f"{number} {line}" for line in range(5)], f"part-{number}.jsonl")
    source = HuggingFaceSource.Config(path="json", data_files=str(tmp_path / "part-*.jsonl")).build()
    order = Order(seed=0, shuffle=True, infinite=False)
    assert [{text[0] for text in read(source, order, index, 4)} for index in range(4)] == [{"0"}, {"1"}, {"2"}, {"3"}]


def test_a_shuffle_buffer_of_one_keeps_the_order_within_a_shard(write_jsonl: Callable[..., Path]) -> None:
    lines, order = [f"line {number}" for number in range(50)], Order(seed=0, shuffle=True, infinite=False)
    config = HuggingFaceSource.Config(path="json", data_files=str(write_jsonl(lines)), shuffle_buffer=1)
    assert read(config.build(), order) == lines
    config.shuffle_buffer = 50
    assert read(config.build(), order) != lines


def test_a_glob_pattern_reads_files_sorted_by_name(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    write_jsonl(["c"], "2.jsonl")
    write_jsonl(["a", "b"], "1.jsonl")
    (tmp_path / "x.txt").write_text("one file, one document\n\nof two paragraphs")
    assert read(JsonlSource.Config(path=tmp_path / "*.jsonl").build()) == ["a", "b", "c"]
    assert read(TextSource.Config(path=str(tmp_path / "*.txt")).build()) == [
        "one file, one document\n\nof two paragraphs"
    ]
    assert read(TextSource.Config(path=tmp_path / "x.txt", separator="\n\n").build())[1] == "of two paragraphs"


def test_blank_lines_and_a_missing_final_line_feed_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\n   \n{"body": 1, "text": "b"}\n\n{"text": "c"}')
    source = JsonlSource.Config(path=path).build()
    assert read(source) == ["a", "b", "c"]
    assert source.place(1) == f"{path}, line 4"


def test_identity_depends_on_the_texts_and_not_on_their_folder(
    source: Source, tmp_path: Path, texts: list[str]
) -> None:
    def identity(folder: str, texts: list[str]) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return JsonlSource.Config(path=tmp_path / folder / "texts.jsonl").build().identity()

    assert json.loads(json.dumps(source.identity())) == source.identity()
    assert identity("one", texts) == identity("two", texts)
    assert identity("three", [*texts[:-1], texts[-1][:-1] + "?"]) != identity("four", texts)


JSONL_ERRORS = {
    "bad JSON": (
        '{"text": "a"}\n{"text": "b"\n',
        r"texts\.jsonl, line 2 must be a JSON object, got invalid JSON \(Expecting ',' delim",
    ),
    "bad JSON after an empty line": ('{"text": "a"}\n\n\n{text}\n', r"texts\.jsonl, line 4"),
    "no field": ('{"title": "x", "body": "a"}\n', r"line 1 must have the field 'text', got the fields: title, body"),
    "a null": (
        '{"text": "a"}\n{"text": null}\n',
        r"texts\.jsonl, line 2: the field 'text' must be a string, got NoneType",
    ),
    "a list": ('["text"]\n', r"texts\.jsonl, line 1 must be a JSON object .*, got a list"),
    "a string": ('"text"\n', r"texts\.jsonl, line 1 must be a JSON object .*, got a str"),
    "not UTF-8": (b'{"text": "\xff"}\n', r"texts\.jsonl, line 1 must be UTF-8, got probably ISO-8859-1"),
    "an empty file": ("", r"texts\.jsonl must have at least one JSON object"),
    "only empty lines": ("\n\n", r"texts\.jsonl must have at least one JSON object"),
    "only empty texts": ('{"text": ""}\n{"text": ""}\n', "at least one document with text, got 2 empty documents"),
}


@pytest.mark.parametrize("case", JSONL_ERRORS)
def test_a_bad_record_is_an_error_with_file_and_line_on_opening(case: str, tmp_path: Path) -> None:
    content, message = JSONL_ERRORS[case]
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        JsonlSource.Config(path=path).build()


def test_without_check_a_bad_record_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n')
    stream = JsonlSource.Config(path=path, check=False).build().stream(0, 1, 0, STRAIGHT)
    assert next(stream).text == "a"
    with pytest.raises(ValueError, match=r"line 2"):
        next(stream)


def test_text_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nnot \xff fine")
    with pytest.raises(
        ValueError,
        match=r"a\.txt, line 2 must be UTF-8, got probably ISO-8859-1\. Convert it: iconv -f ISO-8859-1 -t",
    ):
        TextSource.Config(path=path).build()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"TextSource\.Config must have at least one document .*got no document"):
        TextSource.Config(path=path).build()
    with pytest.raises(ValueError, match='separator must have at least one character, got ""'):
        TextSource.Config(path=path, separator="").build()


def test_parquet_errors(tmp_path: Path) -> None:
    def build(column: dict[str, Any]) -> None:
        pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
        ParquetSource.Config(path=tmp_path / "a.parquet", cache_dir=tmp_path / "cache").build()

    with pytest.raises(ValueError, match=r"a\.parquet must have the field 'text', got the fields: body"):
        build({"body": ["a"]})
    with pytest.raises(ValueError, match="'text' must be of strings, got int64"):
        build({"text": [1]})
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 2: the field 'text' must be a string, got null \(in 1 records\)"
    ):
        build({"text": ["a", None]})
    with pytest.raises(ValueError, match="at least one document with text, got 2 empty documents"):
        build({"text": ["", ""]})
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must be a complete Parquet file"):
        ParquetSource.Config(path=tmp_path / "a.parquet").build()


def test_streamed_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = HuggingFaceSource.Config(path="json", data_files=str(path), cache_dir=tmp_path / "cache")
    path.write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match="json train must have the field 'text', got the fields: body"):
        read(config.build())
    path.write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="json train: the field 'text' must be a string, got int"):
        read(config.build())
    path.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match="json train: the shards of this stream cannot be read after record 0: "):
        read(config.build())
    path.write_text('{"text": "only one document"}\n')
    with pytest.raises(ValueError, match=r"got none for stream 1 of 2\..* number of shards \(1\)"):
        read(config.build(), Order(seed=0, shuffle=False, infinite=True), index=1, num_streams=2)


@pytest.mark.parametrize("streaming", [True, False])
def test_an_error_of_load_dataset_names_the_dataset_and_split(streaming: bool, tmp_path: Path) -> None:
    config = HuggingFaceSource.Config(path="json", data_files=str(tmp_path / "no.jsonl"), streaming=streaming)
    with pytest.raises(FileNotFoundError, match="The dataset json, split train, cannot be loaded"):
        config.build()
    config = HuggingFaceSource.Config(path="nobody/nothing", name="en", streaming=streaming)
    with pytest.raises((FileNotFoundError, ConnectionError), match=r"The dataset nobody/nothing \(en\), split train"):
        config.build()
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1 document, got 0"):
        HuggingFaceSource.Config(path="json", shuffle_buffer=0).build()


def test_a_missing_file_error_names_the_nearest_file(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    write_jsonl(["a"], "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"nearest name is .*train\.jsonl"):
        JsonlSource.Config(path=tmp_path / "trian.jsonl").build()
    with pytest.raises(FileNotFoundError, match=r"The folder .* does not exist; the nearest"):
        TextSource.Config(path=tmp_path / "no" / "folder" / "x.txt").build()
    with pytest.raises(FileNotFoundError, match=r"must match at least one file"):
        ParquetSource.Config(path=tmp_path / "*.parquet").build()
    with pytest.raises(IsADirectoryError, match=r"train\.jsonl"):
        JsonlSource.Config(path=tmp_path).build()


def test_a_stream_with_only_empty_documents_is_an_error(write_jsonl: Callable[..., Path]) -> None:
    source = JsonlSource.Config(path=write_jsonl(["a", ""])).build()
    with pytest.raises(ValueError, match="got only empty ones in stream 1 of 2"):
        list(itertools.islice(source.stream(1, 2, 0, Order(0, False, True)), 10))
    assert "a" in [d.text for d in itertools.islice(source.stream(1, 2, 0, Order(0, True, True)), 50)]
