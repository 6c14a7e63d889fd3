"""Byte-pair encoding (BPE) from a tiktoken file, such as Llama 3's `tokenizer.model` or `cl100k_base.tiktoken`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from titan_data.files import find_tokenizer
from titan_data.tokenizer import Ids, Tokenizer, is_failure, well_formed

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regular expression with which Llama 3 and GPT-4 split text into words before the BPE merges."""

PART_LENGTH = 16_384
"""Minimum characters per piece of a long text, which is split before the space after a word; no id changes."""

SAFE_LENGTH = 100_000
"""Characters that any pattern can process at once. A longer piece is split at this length only if the regex fails,
as it does for a megabyte of spaces."""

_END_OF_WORD = re.compile(r"(?<=\S) ")
_LEFT_OF_SPACE = ("a", "Ab", "é", "中", "12", ".", "!?", "'", "a's", "_")
_UNUSED_NAME = "\U0010ffff"  # a noncharacter, which no text contains
_NO_IDS = np.empty(0, np.int64)


class TiktokenTokenizer(Tokenizer):
    """BPE tokenizer from a tiktoken file (per line: token bytes in base64, space, id) and a list of special tokens.

    Raises FileNotFoundError, and ValueError for an invalid file (with the line) or special tokens whose ids are already
    in use. White space too long for the pattern (a megabyte of spaces) is split.
    """

    class Config(Tokenizer.Config):
        path: str | Path
        """The tiktoken file of BPE ranks."""
        pattern: str = LLAMA3_PATTERN
        """The regular expression that splits text into words; use the one with which the ranks were trained."""
        special_tokens: dict[str, int] = {}
        """Special tokens as name -> id, with ids that the file does not use."""
        bos: str | None = None
        """The special token to use as BOS."""
        eos: str | None = None
        """The special token to use as EOS."""

    def __init__(self, config: Config) -> None:
        import tiktoken

        file = find_tokenizer(config.path)
        content = file.read_bytes()
        ranks = _parse_ranks(content, file)
        specials = dict(config.special_tokens)
        _check_specials(specials, ranks)
        self.vocab_size = 1 + max([*ranks.values(), *specials.values()])
        self.bos_id = _special_id(config.bos, specials)
        self.eos_id = _special_id(config.eos, specials)
        settings = repr((config.pattern, sorted(specials.items()))).encode()
        self.fingerprint = f"TiktokenTokenizer {hashlib.sha256(content + settings).hexdigest()[:16]}"
        self._ends_words_at_spaces = _ends_words_at_spaces(config.pattern)
        searched = specials or {_UNUSED_NAME: self.vocab_size}  # for an empty dict tiktoken matches "" everywhere
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=config.pattern, mergeable_ranks=ranks, special_tokens=searched
        )

    def encode(self, text: str) -> Ids:
        return np.concatenate([_NO_IDS, *self.encode_parts(text)])

    def encode_parts(self, text: str) -> Iterator[Ids]:
        start = 0
        while self._ends_words_at_spaces and len(text) - start > PART_LENGTH:
            cut = _END_OF_WORD.search(text, start + PART_LENGTH)
            if cut is None:
                break
            yield self._encode(text[start : cut.start()])
            start = cut.start()
        yield self._encode(text[start:] if start else text)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids]
        if not all(0 <= i < self.vocab_size for i in known):
            raise self._unknown_id(known)
        try:
            return self._encoding.decode(known)
        except KeyError as error:
            raise self._unknown_id(known) from error

    def _encode(self, text: str) -> Ids:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)
        except UnicodeEncodeError:
            return self._encode(well_formed(text))
        except BaseException as error:  # older tiktoken raises a Rust panic, which is not an Exception
            if not is_failure(error):
                raise
            if len(text) <= SAFE_LENGTH:
                raise ValueError(f"tiktoken failed to split the text with the pattern: {error}") from error
            pieces = [text[start : start + SAFE_LENGTH] for start in range(0, len(text), SAFE_LENGTH)]
            return np.concatenate([self._encode(piece) for piece in pieces])


def _parse_ranks(content: bytes, file: Path) -> dict[bytes, int]:
    """Return token bytes -> id. Raises ValueError for an invalid file.

    tiktoken's own reader caches by path and would return the old content after the file has changed.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{file}, line {number} must be token bytes in base64, a space and an id, got {_shown(line)}. For a "
                "tokenizer.json, use HFTokenizer."
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{file} must have all 256 single bytes as tokens, got {len(ranks)} tokens without {len(missing)} of them. "
            "Download the file again; it may be truncated."
        )
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError(
            f"Token ids in {file} must be unique and at least 0, got a duplicate or negative id. "
            "Download or create the file again."
        )
    return ranks


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _check_specials(specials: dict[str, int], ranks: dict[bytes, int]) -> None:
    used = set(ranks.values())
    taken = [name for name, number in specials.items() if number in used or number < 0]
    if taken or len(set(specials.values())) < len(specials):
        raise ValueError(
            f"Ids of special tokens must be unique, at least 0 and not used in the file, got other ids for "
            f"{taken or list(specials)}. Use ids from {max(used) + 1}."
        )


def _special_id(name: str | None, specials: dict[str, int]) -> int | None:
    if name is None:
        return None
    if name not in specials:
        raise ValueError(
            f"bos and eos must be special tokens ({sorted(specials)}), got {name!r}. "
            "Add the token to special_tokens with its id."
        )
    return specials[name]


def _ends_words_at_spaces(pattern: str) -> bool:
    """Return whether every word of `pattern` ends before a space that follows a character, so text can be split there.

    Raises ValueError for an invalid regular expression.
    """
    import regex  # type: ignore[import-untyped]  # the dialect of tiktoken's patterns

    try:
        words = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(
            f"pattern must be a regular expression, got {pattern!r} ({error}). Use the pattern with which the ranks "
            "were trained."
        ) from error
    return all(
        before in {word.end() for word in words.finditer(text)}
        for before, text in (
            (len(left), f"{left} {right}") for left in _LEFT_OF_SPACE for right in ("a", "1", ".", " b")
        )
    )
