"""Tokenizer from a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from titan_data.control_tokens import Names, names_in, rewritten, unknown_id
from titan_data.files import find_tokenizer
from titan_data.special_tokens_files import special_names_beside
from titan_data.tokenizer import Ids, Tokenizer, is_failure, well_formed


class HFTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library (extra `hf`), loaded from a `tokenizer.json`.

    Text is never encoded as a control or added token, nor as a token named in `tokenizer_config.json` or
    `special_tokens_map.json` in the same folder. Raises FileNotFoundError, ImportError without `tokenizers`, ValueError
    for an invalid `tokenizer.json` or an unknown token.
    """

    class Config(Tokenizer.Config):
        path: str | Path
        """The `tokenizer.json` or its folder."""
        bos: str | None = None
        """The BOS token; `tokenizer.json` does not specify one."""
        eos: str | None = None
        """The EOS token."""
        text_tokens: list[str] = []
        """Added tokens and control-token names to encode as tokens in text, such as words added to a vocabulary. All
        other names are encoded as plain text. Added white-space tokens that are not special are always allowed."""
        unspellable: Literal["error", "drop"] = "error"
        """Handling of a control-token name in text that the model cannot encode as plain text: raise ValueError
        ("error"), or drop its unknown characters ("drop")."""

    def __init__(self, config: Config) -> None:
        file = _file(Path(config.path).expanduser())
        content = file.read_bytes()
        self._tokenizer = _load(content, f"{file}")
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError(f"{file} must have at least one token, got none.")
        self.vocab_size = 1 + max(vocab.values())
        self.bos_id = self._token_id(config.bos, "bos", file)
        self.eos_id = self._token_id(config.eos, "eos", file)
        self._document = json.loads(self._tokenizer.to_str())
        chosen = {name for name in (config.bos, config.eos) if name is not None}
        self._names, further = self._names_of(chosen | special_names_beside(file), set(config.text_tokens), file)
        self._detecting = self._rewritten(detecting=True)
        self._spelling: Any = None  # created for the first text that contains a name
        self._unk_id = unknown_id(self._document["model"])
        self._is_control = _control_ids(self._tokenizer, self._names, self._unk_id, self.vocab_size)
        self._drop = config.unspellable == "drop"
        settings = repr((sorted(config.text_tokens), config.unspellable)) if config.text_tokens or self._drop else ""
        settings += repr(further) if further else ""
        self.fingerprint = f"HFTokenizer {hashlib.sha256(content + settings.encode()).hexdigest()[:16]}"

    def encode(self, text: str) -> Ids:
        try:
            encoding = self._detecting.encode(text, add_special_tokens=False)
        except TypeError:  # raised by tokenizers for an unpaired surrogate
            text = well_formed(text)
            encoding = _encoded(self._detecting, text)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise _failure(error) from error
        ids = np.array(encoding.ids, dtype=np.int64)
        if len(ids) and ids.max() >= self.vocab_size:
            offsets = encoding.offsets
            return self._spelled(text, [offsets[place] for place in np.flatnonzero(ids >= self.vocab_size)])
        return self._checked(ids)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids]
        if not all(0 <= i < self.vocab_size for i in known):
            raise self._unknown_id(known)
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def _spelled(self, text: str, spans: list[tuple[int, int]]) -> Ids:
        """Return the ids of a text with control-token names at `spans` (in characters), encoded as plain text."""
        if self._spelling is None:
            self._spelling = self._rewritten(detecting=False)
        encoding = _encoded(self._spelling, text)
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        unknown = ids == (-1 if self._unk_id is None else self._unk_id)
        named, known = _marked(np.array(spans), len(text)), _marked(offsets[~unknown], len(text))
        if self._drop:
            before = np.concatenate([[0], np.cumsum(named)])
            ids = ids[~(unknown & (before[offsets[:, 1]] > before[offsets[:, 0]]))]
        else:
            for begin, end in spans:
                lost = "".join(text[place] for place in range(begin, end) if not known[place])
                if self._normalized(lost).strip():  # otherwise the normalizer removed the characters
                    raise ValueError(
                        "A control-token name in text must be encodable as plain text, got "
                        f"{text[begin:end]!r} at character {begin + 1:,}, for which the vocabulary has no tokens. "
                        'Remove it from the text, or set unspellable="drop".'
                    )
        return self._checked(ids)

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _checked(self, ids: Ids) -> Ids:
        """Return `ids`. Raises ValueError for the id of a control token: a safeguard against bugs and attacks."""
        if self._is_control[ids].any():
            number = ids[self._is_control[ids]][0]
            token = self._tokenizer.id_to_token(int(number))
            raise ValueError(f"Text must not be encoded as a control token, got {token!r}.")
        return ids

    def _names_of(self, chosen: set[str], text_tokens: set[str], file: Path) -> tuple[Names, list[str]]:
        """Return the names, and a sorted list of those that are control tokens only because of `chosen`."""
        names, alone = (names_in(self._document, each, text_tokens) for each in (chosen, set()))
        unknown_names = sorted(text_tokens - names.text.keys())
        if unknown_names:
            raise ValueError(f"text_tokens must be added or control tokens of {file}, got {unknown_names}.")
        return names, sorted(names.control - alone.control)

    def _rewritten(self, *, detecting: bool) -> Any:
        document = rewritten(self._document, self._names, self.vocab_size, detecting=detecting)
        return _load(json.dumps(document).encode(), "the rewritten tokenizer")

    def _token_id(self, token: str | None, name: str, file: Path) -> int | None:
        if token is None:
            return None
        number: int | None = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{name} must be a token of {file}, got {token!r}. See added_tokens in that file.")
        return number


def _control_ids(tokenizer: Any, names: Names, unk_id: int | None, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Return a mask over all ids: True for control and added tokens, False for the unknown token."""
    mask = np.zeros(vocab_size, dtype=np.bool_)
    mask[[number for name in names.control if (number := tokenizer.token_to_id(name)) is not None]] = True
    if unk_id is not None:
        mask[unk_id] = False
    return mask


def _marked(spans: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
    """Return a mask over `length` characters: True inside any of `spans`, int64 [N, 2]."""
    changes = np.zeros(length + 1, dtype=np.int64)
    np.add.at(changes, spans[:, 0], 1)
    np.add.at(changes, spans[:, 1], -1)
    return np.cumsum(changes)[:length] > 0


def _load(content: bytes, name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('HFTokenizer needs the package tokenizers. Run: pip install "titan-data[hf]"') from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ValueError(
            f"{name} must be a tokenizer.json that the tokenizers library can load, got an error: {error}. For a file "
            "of tiktoken ranks, use TiktokenTokenizer."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encoded(tokenizer: Any, text: str) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise _failure(error) from error


def _failure(error: BaseException) -> ValueError:
    """Return the error for a text that `tokenizers` fails to encode."""
    return ValueError(f"The tokenizers library failed to encode the text: {error}")


def _file(path: Path) -> Path:
    """Return the file at `path`, or the `tokenizer.json` in it if `path` is a folder.

    Raises ValueError for a symbolic link out of its folder, which a downloaded folder may contain; links into the
    `blobs` of a hub cache are allowed.
    """
    file = find_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    target, folder = file.resolve(), file.parent.resolve()
    if file.is_symlink() and folder not in target.parents and target.parent.name != "blobs":
        raise ValueError(
            f"{file} must not link out of its folder, got a link to {target}. To use that file, set path to it."
        )
    return file
