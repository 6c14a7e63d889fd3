"""Tokenizer interface."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from titan_config import Configurable

Ids = npt.NDArray[np.int64]


class Tokenizer(Configurable, abc.ABC):
    """Base class of tokenizers: conversion between text and token ids.

    vocab_size: one more than the largest id that `encode` may return, including `bos_id` and `eos_id`.
    bos_id, eos_id: ids that the loader adds before and after documents if configured; None if there is no such token.
    fingerprint: name of the tokenizer and a hash of everything that determines its ids; tokenizers with equal
    fingerprints return equal ids.
    """

    class Config(Configurable.Config):
        pass

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, int64 [N], without BOS and EOS. Special-token names in `text` are plain text."""

    def encode_parts(self, text: str) -> Iterator[Ids]:
        """Yield `encode(text)` in pieces, so that the first tokens of a long text are available at once."""
        yield self.encode(text)

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Raises ValueError for an id outside the vocabulary."""

    def _unknown_id(self, ids: Iterable[int]) -> ValueError:
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        got = "an id without a token" if outside is None else str(outside)
        return ValueError(f"Ids to decode must be token ids from 0 to {self.vocab_size - 1}, got {got}.")


def well_formed(text: str) -> str:
    """Return `text` with unpaired surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_failure(error: BaseException) -> bool:
    """Return True for an error or a Rust panic (PyO3's PanicException is not an Exception), False for an interrupt."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
