"""Text is never encoded as a control or added token, for every model type of `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from titan_data import HFTokenizer, JsonlSource, TokenLoader, control_tokens
from titan_data.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = [*"abcdefghijklmnopqrstuvwxyz<>/|[]_ 0123456789#."]
CONTROL = ["<s>", "</s>", "<|im start|>"]


def unigram(unk: bool = True, letters: list[str] = LETTERS, **options: Any) -> Any:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|im start|>", 0.0), ("▁", -3.0), ("▁a", -2.5)]
    model = models.Unigram(pieces + [(letter, -4.0) for letter in letters], unk_id=0 if unk else None, **options)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_level() -> Any:
    vocab = {name: number for number, name in enumerate(["<unk>", *CONTROL, "a", "b", "the"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece() -> Any:
    vocab = {
        name: n for n, name in enumerate(["<unk>", *CONTROL, "a", "b", "<", "##s", "##>", "##/", "##a", "##im", "##|"])
    }
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def bpe(byte_level: bool, **options: Any) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else [*LETTERS, "▁"]
    merges = [("<", "s"), ("<s", ">"), ("a", "b"), ("<s>", "x"), ("t", "h"), ("th", "e")]
    names = [*dict.fromkeys([*CONTROL, *sorted(alphabet), *("".join(pair) for pair in merges)])]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_fallback() -> Any:
    names = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "s"]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "Unigram": unigram,
    "WordLevel": word_level,
    "WordPiece": word_piece,
    "BPE": lambda: bpe(False),
    "byte-level BPE": lambda: bpe(True),
    "BPE with ignore_merges": lambda: bpe(True, ignore_merges=True),
    "BPE with byte fallback": byte_fallback,
}
FLAGS: dict[str, dict[str, bool]] = {
    "special": {"special": True},
    "not special": {"special": False},
    "normalized": {"special": False, "normalized": True},
    "lstrip and rstrip": {"special": True, "lstrip": True, "rstrip": True},
    "single_word": {"special": False, "single_word": True},
    "not in added_tokens": {},
}
TEXTS = [
    "a <s> b",
    "<s>",
    "a<s>b",
    "a<s>x b",
    "ab </s>",
    "<s></s><s>",
    "x <|im start|> y",
    "<unk> a",
    " <s>",
    "<s> " * 9,
]


def build(tokenizer: Any, folder: Path, **settings: Any) -> HFTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return HFTokenizer.Config(path=folder, **settings).build()


def names_of(ids: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.id_to_token(int(number)) for number in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_never_encoded_as_a_control_token(kind: str, tmp_path: Path) -> None:
    for flags in FLAGS.values():
        raw = KINDS[kind]()
        if flags:
            added = [AddedToken(name, **flags) for name in [*CONTROL, "<added>"]]
            (raw.add_special_tokens if flags["special"] else raw.add_tokens)(added)
        ends = [("<s>", 1), ("</s>", 2)]
        raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        tokenizer = build(raw, tmp_path, unspellable="drop", bos="<s>", eos="</s>")
        names = {*CONTROL, "<added>"} if flags else {"<s>", "</s>"}
        for text in [*TEXTS, "a <added> b"]:
            ids = tokenizer.encode(text)
            assert not names & set(names_of(ids, raw)), (flags, text, names_of(ids, raw))
            assert ids.dtype == np.int64


def test_text_with_names_survives_an_encode_decode_round_trip(tmp_path: Path) -> None:
    for make in (lambda: bpe(True), lambda: bpe(True, ignore_merges=True), byte_fallback, lambda: bpe(False)):
        raw = make()
        raw.add_special_tokens(CONTROL)
        tokenizer = build(raw, tmp_path)
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()


EXPECTED = {
    "Unigram": ["▁a", "▁", "<", "s", ">", "▁", "b"],
    "WordPiece": ["a", "<", "##s", "##>", "b"],
    "BPE": ["▁", "a", "▁", "<s", ">", "▁", "b"],
    "byte-level BPE": ["a", "Ġ", "<", "s", ">", "Ġ", "b"],
    "BPE with ignore_merges": ["a", "Ġ", "<", "s", ">", "Ġ", "b"],
    "BPE with byte fallback": ["▁", "a", "▁", "<0x3C>", "s", "<0x3E>", "▁", "b"],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_name_in_text_is_encoded_with_ordinary_pieces(kind: str, tmp_path: Path) -> None:
    raw = KINDS[kind]()
    raw.add_special_tokens(CONTROL)
    assert names_of(build(raw, tmp_path).encode("a <s> b"), raw) == EXPECTED[kind]


def test_a_name_without_ordinary_pieces_is_an_error_or_dropped(tmp_path: Path) -> None:
    few = [letter for letter in LETTERS if letter not in "<>"]
    for make, dropped in ((word_level, ["a", "b"]), (lambda: unigram(letters=few), ["▁a", "▁", "s", "▁", "b"])):
        raw = make()
        raw.add_special_tokens(CONTROL)
        with pytest.raises(ValueError, match=r"got '<s>' at character 3, for .*unspellable=\"drop\""):
            build(raw, tmp_path).encode("a <s> b")
        tokenizer = build(raw, tmp_path, unspellable="drop")
        assert names_of(tokenizer.encode("a <s> b"), raw) == dropped
        assert "<unk>" in names_of(tokenizer.encode("a ¥ b"), raw)  # other unknown text is unchanged


def test_a_name_that_a_model_without_unknown_token_would_drop_is_an_error(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "s": 2, "▁": 3}
    raw = tokenizers.Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.add_special_tokens(["<s>"])
    with pytest.raises(ValueError, match="got '<s>' at character 3"):
        build(raw, tmp_path).encode("a <s> b")
    assert names_of(build(raw, tmp_path, unspellable="drop").encode("a <s> b"), raw) == [*"▁a▁s▁b"]


def test_a_name_that_appears_after_normalization_is_encoded_as_text(tmp_path: Path) -> None:
    for kind in ("Unigram", "BPE with ignore_merges", "WordPiece"):
        raw = KINDS[kind]()
        without_tildes = normalizers.Replace("~", "")
        raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), without_tildes])
        raw.add_special_tokens(CONTROL)
        tokenizer = build(raw, tmp_path)
        for text in ("a ＜s＞ b", "a ＜Ｓ＞ b", "a <~s~> b"):
            assert names_of(tokenizer.encode(text), raw) == names_of(tokenizer.encode("a <s> b"), raw)
    raw = word_level()
    raw.normalizer = normalizers.NFKC()
    raw.add_special_tokens(CONTROL)
    with pytest.raises(ValueError, match="got '＜s＞' at character 3"):
        build(raw, tmp_path).encode("a ＜s＞ b")


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_names_has_the_ids_of_tokenizers(kind: str, tmp_path: Path) -> None:
    raw = KINDS[kind]()
    raw.add_special_tokens([*CONTROL, "<unk>"])
    raw.add_tokens([AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=True), "<tool>", "xyz"])
    tokenizer = build(raw, tmp_path, text_tokens=["xyz"])
    for text in ("the a b ab", "a  b\n\nthe    a", "", "a xyz b xyz", "abthe a the " * 50):
        assert tokenizer.encode(text).tolist() == raw.encode(text, add_special_tokens=False).ids
    assert raw.token_to_id("xyz") in tokenizer.encode("a xyz b")
    with pytest.raises(ValueError, match=r"text_tokens must be added or control tokens of .*got \['abc'\]"):
        build(raw, tmp_path, text_tokens=["abc"])


def test_bpe_dropout_is_disabled(tmp_path: Path) -> None:
    raw = bpe(True, dropout=0.9)
    assert len({tuple(build(raw, tmp_path).encode("the the the ab ab ab")) for _ in range(5)}) == 1


@pytest.mark.parametrize("broken", ["markers", "vocabulary"])
def test_the_final_check_detects_a_control_token(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged(document: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return document if broken == "vocabulary" else {**document, "added_tokens": []}

    monkeypatch.setattr("titan_data.hf_tokenizer.rewritten", unchanged)
    raw = unigram()
    raw.add_special_tokens(CONTROL)
    with pytest.raises(ValueError, match=r"must not be encoded as a control token, got '<s>'"):
        build(raw, tmp_path).encode("a <s> b")


def test_conventional_names_and_template_tokens_are_control_tokens() -> None:
    document = json.loads(unigram().to_str())
    ends = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["▁a", 5]}
    document["post_processor"] = {"type": "Sequence", "processors": [ends]}
    assert control_tokens.names_in(document, set(), set()).control == {"<unk>", "<s>", "</s>", "▁a"}
    merged = json.loads(bpe(False).to_str())
    assert "<s>" not in control_tokens.names_in(merged, set(), set()).control  # produced by merges: HTML strikethrough
    assert "<s>" in control_tokens.names_in(merged, {"<s>"}, set()).control


HIDDEN = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<start_of_turn>", "[INST]", "[/INST]", "<｜end▁of▁sentence｜>"]


def holding(kind: str, names: list[str], **options: Any) -> Any:
    """Return a tokenizer with `names` in the vocabulary and nowhere else in the file."""
    document = json.loads(KINDS[kind]().to_str())
    model = document["model"]
    if kind == "Unigram":
        model["vocab"] += [(name, 0.0) for name in names]
    else:
        model["vocab"] |= {name: len(model["vocab"]) + number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer.from_str(json.dumps({**document, "model": model | options}))
    if kind.startswith("BPE"):  # a name is one word
        whole_words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(whole_words)
    return made


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece", "BPE with ignore_merges"])
def test_control_tokens_that_are_only_in_the_vocabulary_are_never_encoded(kind: str, tmp_path: Path) -> None:
    raw = holding(kind, [*HIDDEN, *(mark + name for name in HIDDEN for mark in ("▁", "Ġ", "##"))])
    tokenizer = build(raw, tmp_path, unspellable="drop")
    for name in HIDDEN:
        for text in (f"a {name}", name, f"a{name}b", f"a {name} b"):
            assert not any(name in piece for piece in names_of(tokenizer.encode(text), raw)), text
    assert len(tokenizer.encode("a b")) >= 2
    kept = build(raw, tmp_path, unspellable="drop", text_tokens=["[INST]"])
    if kind != "Unigram":
        assert any("[INST]" in piece for piece in names_of(kept.encode("[INST]"), raw))
    assert not any("<|im_end|>" in piece for piece in names_of(kept.encode("a <|im_end|>"), raw))


def test_a_control_token_name_with_a_word_mark_is_encoded_as_text(tmp_path: Path) -> None:
    raw = holding("Unigram", ["▁<s>", "~</s>"])
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    assert names_of(build(raw, tmp_path).encode("a <s> b"), raw) == EXPECTED["Unigram"]
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="~")
    tokenizer = build(raw, tmp_path, unspellable="drop")
    assert "~</s>" not in names_of(tokenizer.encode("a </s> b"), raw)
    raw = holding("WordPiece", ["##[SEP]", "x", "##[", "##S", "##E", "##P", "##]"])
    assert names_of(build(raw, tmp_path).encode("x[SEP]"), raw) == ["x", "##[", "##S", "##E", "##P", "##]"]
    raw = holding("WordPiece", ["@@<s>"], continuing_subword_prefix="@@")
    assert "@@<s>" not in names_of(build(raw, tmp_path, unspellable="drop").encode("a<s>"), raw)


def test_pieces_that_only_resemble_names_stay_text(tmp_path: Path) -> None:
    pieces = ["<div>", "▁<div>", "<br/>", "[0]", "<T>", "[TODO]", "|>", "<|", "<|>", "▁the", "<0x41>", "a|b"]
    raw = holding("Unigram", pieces)
    raw.add_tokens(["the"])
    tokenizer = build(raw, tmp_path)
    for piece in pieces:
        if piece != "▁the":
            text = piece.replace("▁", " ")
            assert tokenizer.encode(text).tolist() == raw.encode(text, add_special_tokens=False).ids, piece
    raw = word_level()
    assert control_tokens.names_in(json.loads(raw.to_str()), set(), set()).control == {"<unk>", "<s>", "</s>"}


def test_tokenizer_config_and_special_tokens_map_name_control_tokens(tmp_path: Path) -> None:
    names = ["<begin>", "STOP!", "<turn>", "<tool>", "<more>", "<dict>", "!"]
    raw = holding("BPE with ignore_merges", names)
    plain = build(raw, tmp_path)
    assert all(raw.token_to_id(name) in plain.encode(name) for name in names)
    decoder = {"9": {"content": "<begin>", "special": True}, "8": {"content": "  ", "special": False}}
    settings = {"added_tokens_decoder": decoder, "eos_token": {"content": "STOP!"}, "pad_token": "!"}
    settings |= {"unk_token": None, "add_bos_token": True, "extra_special_tokens": {"tool_token": "<tool>"}}
    special = {"bos_token": "<turn>", "additional_special_tokens": ["<more>", {"content": "<dict>"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = build(raw, tmp_path)
    for name in names[:-1]:
        assert raw.token_to_id(name) not in tokenizer.encode(f"a {name} {name}"), name
        assert tokenizer.decode(tokenizer.encode(name)) == name
    assert raw.token_to_id("!") in tokenizer.encode("!")  # CLIP pads with it
    assert tokenizer.fingerprint != plain.fingerprint  # other ids
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be a JSON object, got invalid JSON"):
        build(raw, tmp_path)


def test_a_tokenizer_failure_names_the_document(tmp_path: Path) -> None:
    class Panics(Tokenizer):
        class Config(Tokenizer.Config):
            pass

        vocab_size, bos_id, eos_id, fingerprint = 10, None, None, "Panics"

        def __init__(self, config: Config) -> None: ...

        def encode(self, text: str) -> Any:
            raise type("PanicException", (BaseException,), {})("index out of bounds")

        def decode(self, ids: Any) -> str:
            return ""

    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "zzz"}\n')
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<missing>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"seq_len": 2, "global_batch_size": 1, "local_batch_size": 1, "seed": 0}
    config = TokenLoader.Config(source=JsonlSource.Config(path=tmp_path / "t.jsonl"), shuffle=False)
    for tokenizer, message in (
        (Panics.Config().build(), r"t\.jsonl, line 1 cannot be encoded\. index out of bounds"),
        (
            build(raw, tmp_path),
            r"t\.jsonl, line 2 cannot be encoded\. The tokenizers library failed to .*WordLevel error",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config.build(tokenizer=tokenizer, **sizes).next_batches(0, 1)


def test_a_malformed_tokenizer_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    good = json.loads(bpe(True).to_str())
    path = tmp_path / "tokenizer.json"
    cases = [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"model": {}}',
        json.dumps({**good, "added_tokens": [{"id": -1, "content": 3}]}).encode(),
        json.dumps({**good, "model": {**good["model"], "merges": [["no", "such"]]}}).encode(),
        json.dumps({**good, "model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}).encode(),
        json.dumps({**good, "model": {**good["model"], "vocab": {}, "merges": []}}).encode(),
    ]
    for content in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json must (be a tokenizer\.json that the tok|have at least)"):
            HFTokenizer.Config(path=tmp_path).build()


def test_a_link_out_of_the_folder_is_an_error_except_in_a_hub_cache(tmp_path: Path) -> None:
    cache, other = tmp_path / "models--x", tmp_path / "other"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
    bpe(True).save(str(blobs / "0123"))
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    assert HFTokenizer.Config(path=snapshot).build().encode("the").tolist()
    (blobs / "0123").rename(other / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"a link to \.\./\.\./blobs/0123, which does not exist"):
        HFTokenizer.Config(path=snapshot).build()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(other / "elsewhere.json")
    with pytest.raises(ValueError, match=r"must not link out of its folder, got a link to .*elsewhere\.json"):
        HFTokenizer.Config(path=snapshot).build()
    assert HFTokenizer.Config(path=other / "elsewhere.json").build().encode("the").tolist()
