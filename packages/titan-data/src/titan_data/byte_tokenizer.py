"""Byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from titan_data.tokenizer import Ids, Tokenizer, well_formed


class ByteTokenizer(Tokenizer):
    """Byte-level tokenizer: the ids of a text are its UTF-8 bytes; BOS is 256, EOS 257. Needs no file."""

    class Config(Tokenizer.Config):
        pass

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    fingerprint = "ByteTokenizer"

    def __init__(self, config: Config) -> None:
        del config

    def encode(self, text: str) -> Ids:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = well_formed(text).encode()
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids]
        if not all(0 <= i < self.vocab_size for i in known):
            raise self._unknown_id(known)
        return bytes(i for i in known if i < 256).decode(errors="replace")
