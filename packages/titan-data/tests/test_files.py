"""Real-world files: compressed, with byte order marks, from Windows, Spark and Polars, and damaged."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from titan_data import (
    ByteTokenizer,
    HFTokenizer,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    Source,
    TextSource,
    TiktokenTokenizer,
    TokenLoader,
    indexed_file,
)
from titan_data.order import Order
from titan_data.testing import commit, global_batch

STRAIGHT = Order(seed=0, shuffle=False, infinite=False)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}
RECORDS = "".join(json.dumps({"text": f"Document {n}: {'été ' * (n % 9)}"}) + "\n" for n in range(3000)).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "titan-data"


def read(source: Source) -> list[str]:
    return [document.text for document in source.stream(0, 1, 0, STRAIGHT)]


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_compressed_file_is_equivalent_to_its_content(kind: str, tmp_path: Path, cache: Path) -> None:
    plain = JsonlSource.Config(path=written(tmp_path / "a.jsonl", RECORDS)).build()
    path = written(tmp_path / f"a.jsonl.{kind}", COMPRESS[kind](RECORDS))
    packed = JsonlSource.Config(path=path).build()
    assert read(packed) == read(plain)
    assert packed.identity() == plain.identity()  # a run may resume after its files were compressed
    assert packed.place(7) == f"{path}, line 8"
    (unpacked,) = cache.glob("*.unpacked")
    before = unpacked.stat().st_mtime_ns
    JsonlSource.Config(path=path).build()
    assert unpacked.stat().st_mtime_ns == before  # unpacked once
    written(path, COMPRESS[kind](RECORDS.replace(b"Document 7:", b"Document x:")))
    assert read(JsonlSource.Config(path=path).build())[7].startswith("Document x:")

    text = written(tmp_path / f"a.txt.{kind}", COMPRESS[kind]("\ufeffone\r\n\r\ntwo".encode()))
    assert read(TextSource.Config(path=text, separator="\n\n").build()) == ["one", "two"]


@pytest.mark.parametrize("kind", COMPRESS)
def test_several_frames_and_padding_are_read_as_one_file(kind: str, tmp_path: Path) -> None:
    cuts = [0, 1000, 1000, len(RECORDS)]
    parts = [COMPRESS[kind](RECORDS[begin:end]) for begin, end in itertools.pairwise(cuts)]
    path = written(tmp_path / "a.jsonl", b"".join(parts) + b"\0" * 512)  # detected by its bytes, not its name
    assert len(read(JsonlSource.Config(path=path).build())) == 3000


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_damaged_compressed_file_is_an_error_with_the_position(kind: str, tmp_path: Path, cache: Path) -> None:
    whole = COMPRESS[kind](os.urandom(200_000).hex().encode() if kind == "gz" else RECORDS)
    middle = len(whole) // 2
    for number, damaged in enumerate(
        [whole[:middle], whole[:-1], whole[:middle] + b"\0" * 64 + whole[middle + 64 :], whole + b"garbage"]
    ):
        path = written(tmp_path / f"{number}.jsonl.{kind}", damaged)
        for config in (JsonlSource.Config(path=path), TextSource.Config(path=path)):
            if number == 2 and kind == "zst":  # has no checksum: the damage is detected in the text
                with pytest.raises(ValueError, match=r"2\.jsonl"):
                    config.build()
                continue
            with pytest.raises(ValueError, match=rf"{number}\.jsonl.* must be a valid .*damage at byte [\d,]+ of the"):
                config.build()
    assert kind == "zst" or not list(cache.glob("*.unpacked"))  # no partial file is left


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_run_resumes_exactly_from_compressed_files(kind: str, tmp_path: Path) -> None:
    for number in range(3):
        part = b"".join(RECORDS.splitlines(keepends=True)[number * 20 : (number + 1) * 20])
        written(tmp_path / f"part-{number}.jsonl", part)
        written(tmp_path / f"part-{number}.jsonl.{kind}", COMPRESS[kind](part))

    def build(pattern: str) -> TokenLoader:
        config = TokenLoader.Config(source=JsonlSource.Config(path=tmp_path / pattern))
        sizes = {"seq_len": 32, "global_batch_size": 4, "local_batch_size": 1, "seed": 0}
        return config.build(tokenizer=ByteTokenizer.Config().build(), **sizes)

    packed, plain = build(f"*.jsonl.{kind}"), build("*.jsonl")
    for _ in range(5):
        global_batch([packed], 1)
        commit([packed])
    plain.load_state_dict(json.loads(json.dumps(packed.state_dict())))
    for _ in range(3):
        one, other = global_batch([packed], 1), global_batch([plain], 1)
        assert torch.equal(one["tokens"], other["tokens"])
        commit([packed])
        commit([plain])


def test_byte_order_marks_blank_lines_and_windows_line_ends_are_skipped(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \t\r\n{"text": "b"}\r\n{"text": "c\\r\\n"}'
    source = JsonlSource.Config(path=written(tmp_path / "a.jsonl", lines)).build()
    assert read(source) == ["a", "b", "c\r\n"]
    assert source.place(1).endswith("line 4")
    for number, content in enumerate([b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\n"]):
        written(tmp_path / f"blank-{number}.jsonl", content)
    assert read(JsonlSource.Config(path=tmp_path / "*.jsonl").build()) == ["a", "b", "c\r\n"]

    written(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n--\r\ntwo\n--\nthree")
    written(tmp_path / "b.txt", b"")
    assert read(TextSource.Config(path=tmp_path / "*.txt", separator="\n--\n").build()) == ["one", "two", "three"]


CHINESE = "这是一段比较长的中文文本，用来测试编码的识别。今天天气很好，我们去公园散步。"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16-LE"),
        ("utf-16-be", "UTF-16-BE"),
        ("utf-32", "UTF-32"),
        ("utf-32-be", "UTF-32-BE"),
        ("latin-1", "ISO-8859-1"),
        ("cp1252", "(ISO-8859-1|WINDOWS-1252)"),
        ("shift_jis", "cp932"),
        ("gb18030", "gb18030"),
    ],
)
def test_an_encoding_error_names_the_probable_encoding(encoding: str, expected: str, tmp_path: Path) -> None:
    texts = {"shift_jis": "これは日本語の文章です。", "gb18030": CHINESE}
    text = texts.get(encoding, "Le café était fermé hélas, voilà.")
    line = f'{{"text": "{text}"}}\n'.encode(encoding)
    path = written(tmp_path / "a.jsonl", line * 3)
    message = rf"a\.jsonl.* must be UTF-8, got probably {expected}\. Convert it: iconv -f"
    for config in (JsonlSource.Config(path=path), TextSource.Config(path=path)):
        with pytest.raises(ValueError, match=message):
            config.build()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "你好，世界".encode("gb18030"),
            r"byte 0xc4 at position 11 of the line \(possibly .*gb18030.* or .*\)\.",
        ),
        (
            "Это текст.".encode("cp1251"),
            r"byte 0xdd at position 11 of the line \(possibly .*cp1251.* or .*\)\.",
        ),
        (b"a\xed\xa0\x80b", r"an unpaired surrogate \(byte 0xed at position 12 of the line\)\. Write"),
        ("你好，世界".encode()[:-1], r"byte 0xe7 at position 23 of the line\. Convert"),  # damaged UTF-8
    ],
)
def test_an_ambiguous_encoding_error_lists_the_candidates(line: bytes, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'{"text": "' + line + b'"}\n')
    for config in (JsonlSource.Config(path=path), TextSource.Config(path=path)):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 1 must be UTF-8, got {expected}"):
            config.build()


def test_an_error_names_the_content_of_a_compressed_file(tmp_path: Path) -> None:
    for number, kind in enumerate([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz", format=kind) as archive:
            archive.add(written(tmp_path / "a.jsonl", RECORDS), "a.jsonl")
        written(tmp_path / f"{number}.tar", gzip.decompress((tmp_path / f"{number}.tar.gz").read_bytes()))
    for name, content, message in (
        *((f"{number}.{end}", None, "got a tar archive") for number in range(3) for end in ("tar", "tar.gz")),
        ("a.zz", zlib.compress(RECORDS), "got a zlib stream"),
        ("a.lzma", lzma.compress(RECORDS, format=lzma.FORMAT_ALONE), "got an LZMA file"),
        ("a.gz", gzip.compress(gzip.compress(RECORDS)), "must be compressed only once, got gzip data inside"),
        ("b.gz", gzip.compress(zstandard.compress(RECORDS)), "must be compressed only once, got Zstandard data inside"),
        ("c.gz", gzip.compress(b"PK\x03\x04...."), "got a ZIP archive"),
        (
            "a.bin",
            b"".join(n.to_bytes(4, "little") for n in range(50_000, 51_000)),
            "line 1 must be UTF-8, got byte",
        ),
    ):
        path = tmp_path / name if content is None else written(tmp_path / name, content)
        for source in (JsonlSource, TextSource):
            with pytest.raises(ValueError, match=message):
                source.Config(path=path).build()
    assert read(TextSource.Config(path=written(tmp_path / "a.txt", "x^2 is a square")).build()) == ["x^2 is a square"]


def test_concatenated_files_with_byte_order_marks_are_read(tmp_path: Path) -> None:
    part = b'\xef\xbb\xbf{"text": "a"}\n'
    source = JsonlSource.Config(path=written(tmp_path / "a.jsonl", part + b"\xef\xbb\xbf\n" + part)).build()
    assert read(source) == ["a", "a"]
    assert source.place(1).endswith("line 3")


def test_a_duplicate_column_is_an_error(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must have one column 'text', got 2 of that name\. Rename"):
        ParquetSource.Config(path=tmp_path / "a.parquet").build()


def test_a_missing_path_error_lists_existing_files(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.jsonl"
    with pytest.raises(FileNotFoundError, match=rf"got {nowhere}\. The folder {tmp_path} is empty\."):
        JsonlSource.Config(path=nowhere).build()
    with pytest.raises(IsADirectoryError, match=r"tokenizer file, got .* has no tokenizer file \(tokenizer\.json"):
        TiktokenTokenizer.Config(path=tmp_path).build()
    for name in ("CHANGELOG.md", "LICENSE", "README.md", "ranks.tiktoken", "tokenizer_config.json"):
        written(tmp_path / name, "")
    held = r"CHANGELOG\.md, LICENSE, README\.md and 2 more\."
    with pytest.raises(FileNotFoundError, match=rf"got {nowhere}\. Files in {tmp_path}: {held}"):
        JsonlSource.Config(path=nowhere).build()
    with pytest.raises(IsADirectoryError, match=rf"or a pattern such as {tmp_path}/\*\. Files in .*: {held}"):
        JsonlSource.Config(path=tmp_path).build()
    there = rf"Tokenizer files in {tmp_path}: ranks\.tiktoken\.$"
    with pytest.raises(IsADirectoryError, match=there):
        TiktokenTokenizer.Config(path=tmp_path).build()
    with pytest.raises(FileNotFoundError, match=there):
        HFTokenizer.Config(path=tmp_path).build()
    with pytest.raises(FileNotFoundError, match=r"The nearest name is .*/ranks\.tiktoken\."):
        TiktokenTokenizer.Config(path=tmp_path / "rank.tiktoken").build()


LINES = {
    "nested too deeply": '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "an integer of more than 4,300 digits": '{"text": "a", "x": ' + "7" * 5000 + "}",
    "the key 'text' twice": '{"text": "a", "text": "b"}',
    "the key 'n' twice": '{"text": "a", "x": [{"n": 1, "n": 2}]}',
    "NaN, which is not a JSON number": '{"text": "a", "x": NaN}',
    "-Infinity, which is not a JSON number": '{"text": "a", "x": -Infinity}',
    "Extra data": '{"text": "a"} {"text": "b"}',
    "Unterminated string": '{"text": "a',
    "got a int": "7",
}


@pytest.mark.parametrize("problem", LINES)
def test_ambiguous_json_is_an_error(problem: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + LINES[problem] + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3 must be .*{problem}") as caught:
        JsonlSource.Config(path=path).build()
    assert len(str(caught.value)) < 400


def test_a_file_that_changes_after_opening_is_an_error(tmp_path: Path) -> None:
    lines = RECORDS.splitlines(keepends=True)
    path = written(tmp_path / "a.jsonl", RECORDS)
    source = JsonlSource.Config(path=path).build()
    os.utime(path)
    assert source.text(2999) == json.loads(lines[2999])["text"]  # only touched
    for changed in (lines[:100], [*lines[:-1], lines[-1].replace(b"Doc", b"doc")], []):
        written(path, b"".join(changed))
        with pytest.raises(ValueError, match=r"a\.jsonl must not change while it is in use"):
            source.text(2999)
    written(path, RECORDS)
    assert source.text(2999) == json.loads(lines[2999])["text"]


def test_a_source_may_have_more_files_than_can_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_file, "MAX_OPEN", 3)
    for number in range(20):
        written(tmp_path / f"{number:02}.jsonl", json.dumps({"text": f"file {number}"}))
    before = len(os.listdir("/proc/self/fd"))
    source = JsonlSource.Config(path=tmp_path / "*.jsonl").build()
    assert read(source) == [f"file {number}" for number in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def parquet(path: Path, column: Any, name: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({name: column}), path)


def test_every_arrow_string_type_and_empty_files_are_read(tmp_path: Path) -> None:
    texts = ["a", "été", "", "a", "x" * 100]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    columns = [pyarrow.array(texts, kind) for kind in kinds]
    columns += [column.dictionary_encode() for column in columns[:2]]
    for number, column in enumerate(columns):
        parquet(tmp_path / f"part-{number}.parquet", column)
        parquet(tmp_path / f"part-{number}-empty.parquet", column[:0])
    parquet(tmp_path / "part-9-null.parquet", pyarrow.nulls(0))
    parquet(tmp_path / "part-9-other.parquet", pyarrow.array([], pyarrow.int64()), "other")
    written(tmp_path / "_SUCCESS", b"")
    written(tmp_path / ".part-0.parquet.crc", b"crc")
    source = ParquetSource.Config(path=tmp_path / "*").build()
    assert read(source) == texts * 5
    assert source.place(6) == f"{tmp_path / 'part-1.parquet'}, row 2"
    with pytest.raises(ValueError, match=r"part-\*-empty\.parquet must have at least one row, got none"):
        ParquetSource.Config(path=tmp_path / "part-*-empty.parquet").build()
    (tmp_path / "part-1.parquet").write_bytes((tmp_path / "part-1.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-1\.parquet must be a complete Parquet file"):
        ParquetSource.Config(path=tmp_path / "*").build()


def test_row_groups_keep_their_order(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"n": texts, "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    assert read(ParquetSource.Config(path=tmp_path / "a.parquet").build()) == texts


@pytest.mark.parametrize(
    "url", ["s3://bucket/a.jsonl", "gs://b/*.jsonl", "hf://datasets/a/b", "file:///a", "https://x/y"]
)
def test_urls_are_errors_for_every_local_path(url: str, tmp_path: Path, cache: Path) -> None:
    local = written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}'))
    parquet(tmp_path / "a.parquet", ["a"])
    for path in (url, Path(url)):
        for kind in (JsonlSource, TextSource, ParquetSource, HFTokenizer, TiktokenTokenizer):
            with pytest.raises(ValueError, match="path must be a local path"):
                kind.Config(path=path).build()
        for kind, readable in (
            (JsonlSource, local),
            (ParquetSource, tmp_path / "a.parquet"),
            (HuggingFaceSource, "json"),
        ):
            with pytest.raises(ValueError, match="cache_dir must be a local path"):
                kind.Config(path=readable, cache_dir=path).build()
    with pytest.raises(ValueError, match="For a URL, set path to the file format and data_files to the URL"):
        HuggingFaceSource.Config(path=url).build()


def test_files_that_are_not_text_are_errors_that_name_their_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, message in (
        (tmp_path / "pipe.jsonl", "must be a regular file, got .*a pipe, socket or device"),
        (Path("/dev/zero"), "must be a regular file"),
        (written(tmp_path / "a.zip", b"PK\x03\x04...."), "got a ZIP archive"),
        (written(tmp_path / "a.lz4", b"\x04\x22\x4d\x18..."), "got an LZ4 file"),
        (written(tmp_path / "a.par", b"PAR1..."), "got a Parquet file"),
    ):
        for source in (JsonlSource, TextSource):
            with pytest.raises(ValueError, match=message):
                source.Config(path=path).build()
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="a link to nowhere, which does not exist"):
        JsonlSource.Config(path=tmp_path / "link.jsonl").build()
    assert read(TextSource.Config(path=written(tmp_path / "a.txt", "BZh9 is how bzip2 begins")).build())
