"""Rewrite a `tokenizer.json` so that text is never encoded as a control token, whatever its model and flags.

A name such as `<s>` can become its id in two ways: `added_tokens` are extracted from the text before the model runs,
and the vocabulary of the model may contain the name (Unigram and WordLevel pieces, BPE with `ignore_merges` or a merge
that produces it), even if the name appears only after normalization. Two rewritten tokenizers prevent both. In the
*detecting* tokenizer, each name has a marker id beyond the vocabulary and is extracted wherever it occurs; a text
without markers has the ids of the original file. A text with markers is encoded again with the *spelling* tokenizer,
whose vocabulary has no names at all.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

UNMISTAKABLE = re.compile(
    r"<[|｜]/?\w[^\s<>|｜]*[|｜]>"
    r"|<(?:start|end|begin|beginning)_of_\w+>|<(?:unused|extra_id_|special_?|SPECIAL_)\d+>|<reserved_\w+>"
    r"|\[(?:unused|control_)\d+\]|\[[gs]MASK\]|<</?SYS>>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|IMG_BREAK|IMG_END)\]"
)
"""Names that are control tokens in every vocabulary that contains them: ordinary text does not look like this."""
CONVENTIONAL = re.compile(
    r"</?s>|<(?:unk|pad|mask|bos|eos|sep|cls|eod|eop|eot|eom|sop)>|<(?:UNK|PAD|MASK|BOS|EOS|SEP|CLS|EOD|EOP|EOT)>"
    r"|\[(?:UNK|PAD|MASK|BOS|EOS|SEP|CLS|EOD|EOP|EOT|PREFIX|MIDDLE|SUFFIX)\]|</?(?:think|tool_call|tool_response)>"
    r"|<(?:fim_\w+|file_sep|repo_name|jupyter_\w+|issue_(?:start|comment|closed)|commit_(?:before|msg|after))>"
)
"""Names that are control tokens unless a BPE merge produces them: such a merge was learned from text, like `<s>` from
HTML."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ORIGINAL = "\U0010fffe{}\U0010fffe"  # replaces a name at its id; contains a noncharacter, which no text contains


class Names(NamedTuple):
    """The names of the control and added tokens of a tokenizer, and the added tokens that count as text, with ids."""

    control: frozenset[str]
    text: dict[str, int]


def names_in(document: dict[str, Any], chosen: set[str], text_tokens: set[str]) -> Names:
    """Return the names in a parsed `tokenizer.json`; `chosen` are further control tokens, from the config or files.

    Vocabulary pieces with such a name are included, also with a word mark of the model (`▁<s>`, `##[SEP]`). Added
    tokens that are white space (runs of spaces in GPT-NeoX) and not special count as text, as do `text_tokens`.
    """
    model, added = document["model"], document.get("added_tokens") or []
    text = {
        token["content"]: token["id"]
        for token in added
        if token["content"] in text_tokens or (token["content"].isspace() and not token["special"])
    }
    pieces = _pieces(model)
    control = {token["content"] for token in added} | (chosen & pieces.keys())
    control |= _unknown(model) | _in_template(document.get("post_processor"))
    special = control - {token["content"] for token in added if not token["special"]}
    control |= _by_pattern(document, special, text_tokens)
    if model.get("byte_fallback"):
        control = {name for name in control if not _BYTE.fullmatch(name)}
    text |= {name: pieces[name] for name in control & text_tokens & pieces.keys()}
    return Names(frozenset(control - text.keys()), text)


def rewritten(document: dict[str, Any], names: Names, vocab_size: int, *, detecting: bool) -> dict[str, Any]:
    """Return the detecting or the spelling tokenizer as a `tokenizer.json`; see the module docstring."""
    control = sorted(names.control)
    markers = {name: vocab_size + number for number, name in enumerate(control)} if detecting else {}
    model = {key: value for key, value in document["model"].items() if key not in ("vocab", "merges")}
    if model["type"] == "Unigram":
        model["vocab"] = _unigram_vocab(document["model"], names, vocab_size, markers)
    else:
        vocab = document["model"]["vocab"]
        model["vocab"] = {name: number for name, number in vocab.items() if name not in names.control}
        model["vocab"] |= names.text | markers
        if model.get("unk_token") in vocab:
            model["vocab"][_ORIGINAL.format("unk")] = vocab[model["unk_token"]]
            model["unk_token"] = _ORIGINAL.format("unk")
    if "merges" in document["model"]:
        model["merges"] = [
            pair
            for pair in _merges(document["model"])
            if detecting or names.control.isdisjoint((*pair, _joined(pair, document["model"])))
        ]
        model["dropout"] = None  # makes encoding deterministic
    added = [token for token in document.get("added_tokens") or [] if token["content"] in names.text]
    added += [_extracted_token(name, number) for name, number in markers.items()]
    return {**document, "model": model, "added_tokens": added, "post_processor": None}


def unknown_id(model: dict[str, Any]) -> int | None:
    """Return the id of the unknown token; None if there is none, so that the model drops unknown text or raises."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def _unigram_vocab(
    model: dict[str, Any], names: Names, vocab_size: int, markers: dict[str, int]
) -> list[tuple[str, float]]:
    """Return a Unigram vocabulary, in which the id of a piece is its index, with names replaced by placeholders.

    The names in `markers` are appended after all ids.
    """
    pieces = [tuple(piece) for piece in model["vocab"]]
    scores, least = dict(pieces), min(score for _, score in pieces)
    text = {number: name for name, number in names.text.items()}
    pieces += [(text.get(i, _ORIGINAL.format(i)), least) for i in range(len(pieces), vocab_size)]
    kept = [
        (_ORIGINAL.format(number), score) if name in names.control else (name, score)
        for number, (name, score) in enumerate(pieces)
    ]
    return kept + [(name, scores.get(name, least)) for name in markers]


def _by_pattern(document: dict[str, Any], special: set[str], text_tokens: set[str]) -> set[str]:
    """Return the pieces that are control-token names: by pattern, or one of `special` with a word mark of the model."""
    model, mark = document["model"], "|".join(map(re.escape, _marks(document)))
    marks = re.compile(rf"^(?:{mark}|\s)+|(?:{mark}|\s)+$")
    merged = {_joined(pair, model) for pair in _merges(model)}
    found = set()
    for piece in _pieces(model):
        name = marks.sub("", piece)
        if not name or name[0].isalnum() or (name in text_tokens and name != piece):
            continue
        by_convention = piece not in merged and CONVENTIONAL.fullmatch(name)
        if by_convention or UNMISTAKABLE.fullmatch(name) or (name in special and not name[-1].isalnum()):
            found.add(piece)
    return found


def _marks(document: dict[str, Any]) -> list[str]:
    """Return the word marks of a model: the strings that denote a space, a continued word or the end of a word."""
    model = document["model"]
    found = {"▁", "Ġ", "##", "</w>"}
    found |= {model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")}
    parts = [document.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            found |= {part[key] for key in ("replacement", "prepend") if isinstance(part.get(key), str)}
            parts += [part.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
    return sorted(found - {""}, key=len, reverse=True)


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    """Return the vocabulary as piece -> id."""
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or [])
    return [(left, right) for left, right in pairs]


def _joined(pair: tuple[str, str], model: dict[str, Any]) -> str:
    """Return the token that a merge produces; the continuation prefix (`##`) of the second part is removed."""
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _unknown(model: dict[str, Any]) -> set[str]:
    if model["type"] == "Unigram":
        number = model.get("unk_id")
        return set() if number is None else {model["vocab"][number][0]}
    return {model["unk_token"]} & model["vocab"].keys() if model.get("unk_token") is not None else set()


def _in_template(part: Any) -> set[str]:
    """Return the tokens that a post-processor adds around texts: those of templates, and BERT's `cls` and `sep`."""
    if isinstance(part, list):
        return set().union(*map(_in_template, part))
    if not isinstance(part, dict):
        return set()
    found = set(part["special_tokens"]) if isinstance(part.get("special_tokens"), dict) else set()
    found |= {part[key][0] for key in ("cls", "sep") if isinstance(part.get(key), list)}
    return found | _in_template(part.get("processors"))


def _extracted_token(name: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": name, **flags}
