"""A Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from titan_data.files import find_file
from titan_data.tokenizer import Ids, Tokenizer, well_formed


class HFTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library (extra `hf`), read from its `tokenizer.json`.

    Raises FileNotFoundError, ImportError without `tokenizers`, ValueError for a file that is no tokenizer.json or a
    token it does not know.
    """

    class Config(Tokenizer.Config):
        path: str | Path
        """The `tokenizer.json`, or the folder it is in."""
        bos: str | None = None
        """The token that begins a document; the file itself does not say which."""
        eos: str | None = None
        """The token that ends a document."""

    def __init__(self, config: Config) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "Got an HFTokenizer without the package tokenizers. It reads tokenizer.json. "
                "Run pip install titan-data[hf]."
            ) from error
        path = Path(config.path).expanduser()
        file = find_file(path / "tokenizer.json" if path.is_dir() else path)
        content = file.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(
                f"Got {file}, which cannot be read as a tokenizer ({error}). A tokenizer.json of the tokenizers "
                f"library is needed. Give one; a file of tiktoken ranks is for TiktokenTokenizer."
            ) from error
        self._tokenizer.encode_special_tokens = True  # a document that says "<eos>" does not end there
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id = self._token_id(config.bos, file)
        self.eos_id = self._token_id(config.eos, file)
        self.fingerprint = f"HFTokenizer {hashlib.sha256(content).hexdigest()[:16]}"

    def encode(self, text: str) -> Ids:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:  # what tokenizers raises for half a surrogate pair
            encoding = self._tokenizer.encode(well_formed(text), add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids]
        if not all(0 <= i < self.vocab_size for i in known):
            raise self._unknown_id(known)
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def _token_id(self, token: str | None, file: Path) -> int | None:
        if token is None:
            return None
        number: int | None = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(
                f"Got {token!r} for bos or eos, which {file} does not know. It must be one of its tokens. "
                f"Look for it under added_tokens there."
            )
        return number
