"""Byte-pair encoding from a local file of ranks, as Llama 3's `tokenizer.model` or GPT-4's `cl100k_base.tiktoken`."""

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
"""How Llama 3, and GPT-4 alike, cut text into words before the merges."""

PART_LENGTH = 16_384
"""Characters encoded at once, or a few more: long texts are cut before the space after a word, which changes no id."""

SAFE_LENGTH = 100_000
"""Characters any pattern can take at once; the regex gives up on a megabyte of spaces, which is then cut anywhere."""

_END_OF_WORD = re.compile(r"(?<=\S) ")
_LEFT_OF_SPACE = ("a", "Ab", "é", "中", "12", ".", "!?", "'", "a's", "_")
_NEVER_SAID = "\U0010ffff"
_NO_IDS = np.empty(0, np.int64)


class TiktokenTokenizer(Tokenizer):
    """The ranks of `path` (a line: the token's bytes in base64, a space, its id) and special tokens beside them.

    Raises FileNotFoundError, and ValueError for a file that is no such table (with the line) or special tokens
    that do not fit it. A gap that is too long for the pattern (a megabyte of spaces) is cut inside.
    """

    class Config(Tokenizer.Config):
        path: str | Path
        """The file of ranks."""
        pattern: str = LLAMA3_PATTERN
        """The regular expression that cuts text into words; it belongs to the ranks."""
        special_tokens: dict[str, int] = {}
        """Name -> id, ids that the file does not use."""
        bos: str | None = None
        """The special token that begins a document."""
        eos: str | None = None
        """The special token that ends a document."""

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
        told = repr((config.pattern, sorted(specials.items()))).encode()
        self.fingerprint = f"TiktokenTokenizer {hashlib.sha256(content + told).hexdigest()[:16]}"
        self._ends_words_at_spaces = _ends_words_at_spaces(config.pattern)
        searched = specials or {_NEVER_SAID: self.vocab_size}  # with none, tiktoken looks for "" at every character
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
        except BaseException as error:  # older tiktoken panics, which is no Exception
            if not is_failure(error):
                raise
            if len(text) <= SAFE_LENGTH:
                raise ValueError(
                    f"The pattern must be able to cut any text, got an error of tiktoken: {error}"
                ) from error
            pieces = [text[start : start + SAFE_LENGTH] for start in range(0, len(text), SAFE_LENGTH)]
            return np.concatenate([self._encode(piece) for piece in pieces])


def _parse_ranks(content: bytes, file: Path) -> dict[bytes, int]:
    """Read a table of ranks. (tiktoken's own reader keeps a copy by path and serves it after the file has changed.)"""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"Got {_shown(line)} in {file}, line {number}. Each line of a tiktoken file is the token's bytes in "
                f"base64, a space, and its id. Give a tiktoken file; a tokenizer.json is for HFTokenizer."
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"Got {len(ranks)} tokens in {file}, without {len(missing)} of the 256 single bytes. A tiktoken file holds "
            f"them all, or some texts have no ids. Fetch the file again; it may have been cut short."
        )
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError(
            f"Got negative ids, or one id for two tokens, in {file}. Ids are distinct and not negative. "
            f"Fetch the file again, or make it again."
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
            f"Got special tokens {taken or list(specials)} with ids that are negative or already taken. Each needs an "
            f"id of its own that the file does not use. The file's ids end at {max(used)}: begin with {max(used) + 1}."
        )


def _special_id(name: str | None, specials: dict[str, int]) -> int | None:
    if name is None:
        return None
    if name not in specials:
        raise ValueError(
            f"Got {name!r} for bos or eos. It must be one of special_tokens, which are {sorted(specials)}. "
            f"Add it to special_tokens with its id."
        )
    return specials[name]


def _ends_words_at_spaces(pattern: str) -> bool:
    """Whether a word never goes on over a space that follows a character, so that text may be cut there."""
    import regex  # type: ignore[import-untyped]  # what tiktoken's patterns are written for

    try:
        words = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(
            f"Got the pattern {pattern!r}, which is no regular expression ({error}). It cuts text into words before "
            f"the merges. Set pattern to the one that belongs to the ranks."
        ) from error
    return all(
        before in {word.end() for word in words.finditer(text)}
        for before, text in (
            (len(left), f"{left} {right}") for left in _LEFT_OF_SPACE for right in ("a", "1", ".", " b")
        )
    )
