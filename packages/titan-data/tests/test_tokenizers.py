from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from titan_data import ByteTokenizer, HFTokenizer, TiktokenTokenizer

TEXT = "The cat and the dog sing: you, été 1234!\n\n  <|eos|> it's \U0001f600 the end "


def reference(ranks_file: Path, pattern: str = TiktokenTokenizer.Config(path="").pattern) -> tiktoken.Encoding:
    """tiktoken itself, over the same ranks."""
    lines = ranks_file.read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|eos|>": 999})


@pytest.fixture
def hf_file(tmp_path: Path) -> Path:
    """A byte-level BPE with a special token, saved by `tokenizers`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.add_special_tokens(["<|eos|>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_byte_tokenizer_ids_are_the_utf8_bytes() -> None:
    tokenizer = ByteTokenizer.Config().build()
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)


@pytest.mark.parametrize("special_tokens", [{}, {"<|eos|>": 300, "<|bos|>": 272}])
def test_tiktoken_tokenizer_ids_match_tiktoken(ranks_file: Path, special_tokens: dict[str, int]) -> None:
    tokenizer = TiktokenTokenizer.Config(path=ranks_file, special_tokens=special_tokens).build()
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64
    assert ids.tolist() == reference(ranks_file).encode_ordinary(TEXT)  # the special token's name is plain text
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("").tolist() == []


def test_vocab_size_is_one_more_than_the_largest_id_even_with_gaps(ranks_file: Path) -> None:
    specials = {"<|a|>": 275, "<|b|>": 400}
    config = TiktokenTokenizer.Config(path=ranks_file, special_tokens=specials, bos="<|a|>", eos="<|b|>")
    tokenizer = config.build()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (401, 275, 400)
    config.special_tokens, config.bos, config.eos = {}, None, None
    tokenizer = config.build()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (272, None, None)


def test_encode_parts_of_a_long_text_concatenate_to_encode(ranks_file: Path) -> None:
    tokenizer = TiktokenTokenizer.Config(path=ranks_file).build()
    long = "\n".join(f"{TEXT}{number}" + " " * (number % 5) for number in range(2000))
    parts = list(tokenizer.encode_parts(long))
    assert len(parts) > 4
    expected = reference(ranks_file).encode_ordinary(long)
    assert np.concatenate(parts).tolist() == tokenizer.encode(long).tolist() == expected


def test_a_text_is_not_split_if_words_of_the_pattern_contain_spaces(ranks_file: Path) -> None:
    pattern = r"[^\n]+|\n"
    tokenizer = TiktokenTokenizer.Config(path=ranks_file, pattern=pattern).build()
    long = "the end " * 4000
    assert len(list(tokenizer.encode_parts(long))) == 1
    assert tokenizer.encode(long).tolist() == reference(ranks_file, pattern).encode_ordinary(long)


def test_an_invalid_pattern_is_an_error(ranks_file: Path) -> None:
    with pytest.raises(ValueError, match=r"pattern must be a regular expression, got '\(\(\('"):
        TiktokenTokenizer.Config(path=ranks_file, pattern="(((").build()


def test_a_megabyte_of_spaces_is_encoded(ranks_file: Path) -> None:
    tokenizer = TiktokenTokenizer.Config(path=ranks_file).build()
    text = "the cat" + " " * 1_000_000 + "and the dog"
    with pytest.raises(ValueError, match="Regex error"):
        reference(ranks_file).encode_to_numpy(text, disallowed_special=())  # tiktoken itself fails
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_panic_of_tiktoken_is_handled_and_an_interrupt_is_not(
    ranks_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PanicException = type("PanicException", (BaseException,), {})
    tokenizer = TiktokenTokenizer.Config(path=ranks_file).build()
    text, encode = "x" * 150_000, tokenizer._encoding.encode_to_numpy

    def fails_on_long_text(text: str, **options: object) -> np.ndarray:
        if len(text) > 100_000:
            raise error
        return encode(text, **options)

    monkeypatch.setattr(tokenizer._encoding, "encode_to_numpy", fails_on_long_text)
    error: BaseException = PanicException("called unwrap on an Err value")
    assert len(tokenizer.encode(text)) == 150_000
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode(text)


def test_an_interrupt_of_the_hugging_face_tokenizer_propagates(hf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def encode(self, text: str, **options: object) -> None:
            raise KeyboardInterrupt

    tokenizer = HFTokenizer.Config(path=hf_file).build()
    monkeypatch.setattr(tokenizer, "_detecting", Interrupted())
    with pytest.raises(KeyboardInterrupt) as caught:
        tokenizer.encode("abc")
    assert caught.value.__cause__ is None


def test_an_unpaired_surrogate_becomes_a_replacement_character(ranks_file: Path, hf_file: Path) -> None:
    configs = ByteTokenizer.Config(), TiktokenTokenizer.Config(path=ranks_file), HFTokenizer.Config(path=hf_file)
    for config in configs:
        tokenizer = config.build()
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_hf_tokenizer_ids_match_tokenizers(hf_file: Path) -> None:
    tokenizer = HFTokenizer.Config(path=hf_file.parent, bos="<|eos|>", eos="<|eos|>").build()
    expected = tokenizers.Tokenizer.from_file(str(hf_file))
    plain = TEXT.replace("<|eos|>", "")
    assert tokenizer.encode(plain).tolist() == expected.encode(plain, add_special_tokens=False).ids
    assert tokenizer.eos_id not in tokenizer.encode(TEXT)  # <|eos|> in the text is not encoded as EOS
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == expected.get_vocab_size(with_added_tokens=True) == tokenizer.eos_id + 1


def test_a_fingerprint_depends_on_everything_that_determines_the_ids(
    ranks_file: Path, hf_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.tiktoken"
    copy.write_bytes(ranks_file.read_bytes())
    config = TiktokenTokenizer.Config(path=ranks_file)
    first = config.build().fingerprint
    assert TiktokenTokenizer.Config(path=copy).build().fingerprint == first
    others = {ByteTokenizer.Config().build().fingerprint, HFTokenizer.Config(path=hf_file).build().fingerprint}
    others.add(TiktokenTokenizer.Config(path=ranks_file, special_tokens={"<|a|>": 300}).build().fingerprint)
    others.add(TiktokenTokenizer.Config(path=ranks_file, pattern=r"\w+|\W+").build().fingerprint)
    lines = ranks_file.read_text().splitlines()
    copy.write_text("\n".join(lines[:-1]))
    others.add(TiktokenTokenizer.Config(path=copy).build().fingerprint)  # the changed file, not a cached one
    assert len(others - {first}) == 5


def test_decoding_an_id_outside_the_vocabulary_is_an_error(ranks_file: Path, hf_file: Path) -> None:
    configs = ByteTokenizer.Config(), TiktokenTokenizer.Config(path=ranks_file), HFTokenizer.Config(path=hf_file)
    for config in configs:
        tokenizer = config.build()
        for outside in (tokenizer.vocab_size, -1):
            with pytest.raises(ValueError, match=f"must be token ids from 0 to .*, got {outside}"):
                tokenizer.decode([1, outside])


def test_an_invalid_tiktoken_file_is_an_error_with_the_line(ranks_file: Path, tmp_path: Path) -> None:
    lines = ranks_file.read_text().splitlines()
    cases = {
        "line 3": [*lines[:2], "no rank", *lines[3:]],
        "line 1": [json.dumps({"model": {}})],
        "line 5": [*lines[:4], "### 4", *lines[5:]],
        "must have all 256 single bytes as tokens, got 100 tokens without 156": lines[:100],
        "got a duplicate or negative id": [*lines, base64.b64encode(b"zzz").decode() + " 7"],
        "got 0 tokens without 256": [],
    }
    for message, content in cases.items():
        path = tmp_path / "bad.tiktoken"
        path.write_text("\n".join(content))
        with pytest.raises(ValueError, match=message):
            TiktokenTokenizer.Config(path=path).build()


def test_a_missing_tokenizer_error_names_the_nearest_file(ranks_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nearest name is .*small\.tiktoken"):
        TiktokenTokenizer.Config(path=ranks_file.with_name("smal.tiktoken")).build()
    with pytest.raises(FileNotFoundError, match=r"The folder .* does not exist; the nearest"):
        HFTokenizer.Config(path="/nowhere/at/all/tokenizer.json").build()
    with pytest.raises(IsADirectoryError, match=r"got the folder.*small\.tiktoken"):
        TiktokenTokenizer.Config(path=ranks_file.parent).build()


def test_invalid_special_tokens_are_errors(ranks_file: Path, hf_file: Path) -> None:
    with pytest.raises(ValueError, match=r"got other ids for \['<a>'\]\. Use ids from 272"):
        TiktokenTokenizer.Config(path=ranks_file, special_tokens={"<a>": 5}).build()
    with pytest.raises(ValueError, match=r"must be unique, .*got other ids for \['<a>', '<b>'\]"):
        TiktokenTokenizer.Config(path=ranks_file, special_tokens={"<a>": 300, "<b>": 300}).build()
    with pytest.raises(ValueError, match=r"bos and eos must be special tokens \(\['<a>'\]\), got '<c>'"):
        TiktokenTokenizer.Config(path=ranks_file, special_tokens={"<a>": 300}, eos="<c>").build()
    with pytest.raises(ValueError, match=r"bos must be a token of .*, got '<c>'"):
        HFTokenizer.Config(path=hf_file, bos="<c>").build()


def test_a_file_of_another_tokenizer_is_an_error_that_names_it(ranks_file: Path, hf_file: Path) -> None:
    with pytest.raises(ValueError, match="use HFTokenizer"):
        TiktokenTokenizer.Config(path=hf_file).build()
    with pytest.raises(ValueError, match="use TiktokenTokenizer"):
        HFTokenizer.Config(path=ranks_file).build()
