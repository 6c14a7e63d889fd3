"""What the rest of the package asks of a tokenizer."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from titan_config import Configurable

Ids = npt.NDArray[np.int64]


class Tokenizer(Configurable, abc.ABC):
    """Text to ids and back.

    vocab_size: one more than the largest id `encode` may give, `bos_id` and `eos_id` included.
    bos_id, eos_id: put before and after a document where the loader is told to; None where there is none.
    fingerprint: names the tokenizer and hashes all that decides its ids. Two with equal fingerprints give equal ids.
    """

    class Config(Configurable.Config):
        pass

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, int64 [N], without BOS and EOS. Names of special tokens in it are plain text."""

    def encode_parts(self, text: str) -> Iterator[Ids]:
        """Yield `encode(text)` piece by piece, so that the first tokens of a long text are there at once."""
        yield self.encode(text)

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Raises ValueError for an id outside the vocabulary."""

    def _unknown_id(self, ids: Iterable[int]) -> ValueError:
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        got = "an id that stands for no token" if outside is None else str(outside)
        return ValueError(f"Ids to decode must be 0 to {self.vocab_size - 1}, gaps excepted, got {got}.")


def well_formed(text: str) -> str:
    """Return `text` with half surrogate pairs, which no UTF-8 can hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_failure(error: BaseException) -> bool:
    """Return True for an error or a Rust panic (PyO3's PanicException is no Exception), False for an interrupt."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
