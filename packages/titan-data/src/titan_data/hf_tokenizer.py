"""A Hugging Face `tokenizer.json`."""

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
    """Any tokenizer of the `tokenizers` library (extra `hf`), read from its `tokenizer.json`.

    No text becomes a control or added token, nor one that `tokenizer_config.json` or `special_tokens_map.json` beside
    the file names. Raises FileNotFoundError, ImportError without `tokenizers`, ValueError
    for a file that is no tokenizer.json or a token it does not know.
    """

    class Config(Tokenizer.Config):
        path: str | Path
        """The `tokenizer.json`, or the folder it is in."""
        bos: str | None = None
        """The token that begins a document; the file itself does not say which."""
        eos: str | None = None
        """The token that ends a document."""
        text_tokens: list[str] = []
        """Added tokens and control names that texts may hold, such as words added to a vocabulary. Names of all others
        are spelled by the model, as any text. Added tokens of white space that are not special are always text."""
        unspellable: Literal["error", "drop"] = "error"
        """What to do with the name of a control token in a text where the model has no pieces to spell it: raise
        ValueError, or leave out what is unknown of it."""

    def __init__(self, config: Config) -> None:
        file = _file(Path(config.path).expanduser())
        content = file.read_bytes()
        self._tokenizer = _load(content, f"{file}")
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError(f"{file} must hold at least one token, got none.")
        self.vocab_size = 1 + max(vocab.values())
        self.bos_id = self._token_id(config.bos, "bos", file)
        self.eos_id = self._token_id(config.eos, "eos", file)
        self._document = json.loads(self._tokenizer.to_str())
        chosen = {name for name in (config.bos, config.eos) if name is not None}
        self._names, further = self._names_of(chosen | special_names_beside(file), set(config.text_tokens), file)
        self._detecting = self._rewritten(detecting=True)
        self._spelling: Any = None  # made for the first text that holds a name
        self._unk_id = unknown_id(self._document["model"])
        self._is_control = _control_ids(self._tokenizer, self._names, self._unk_id, self.vocab_size)
        self._drop = config.unspellable == "drop"
        told = repr((sorted(config.text_tokens), config.unspellable)) if config.text_tokens or self._drop else ""
        told += repr(further) if further else ""
        self.fingerprint = f"HFTokenizer {hashlib.sha256(content + told.encode()).hexdigest()[:16]}"

    def encode(self, text: str) -> Ids:
        try:
            encoding = self._detecting.encode(text, add_special_tokens=False)
        except TypeError:  # what tokenizers raises for half a surrogate pair
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
        """Return the ids of a text that holds names at `spans` (characters), each spelled as any other text."""
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
                if self._normalized(lost).strip():  # else the normalizer has taken it away
                    raise ValueError(
                        f"Every name of a control token in a text must be spelled by other tokens, got "
                        f"{text[begin:end]!r} at character {begin + 1:,}, for which the model has none. Remove it from "
                        f'the text, or set unspellable="drop" to leave it out.'
                    )
        return self._checked(ids)

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _checked(self, ids: Ids) -> Ids:
        """Return `ids`. Raises ValueError for the id of a control token, which only a bug or a trick can bring here."""
        if self._is_control[ids].any():
            number = ids[self._is_control[ids]][0]
            raise ValueError(f"No text may become a control token, got {self._tokenizer.id_to_token(int(number))!r}.")
        return ids

    def _names_of(self, chosen: set[str], text_tokens: set[str], file: Path) -> tuple[Names, list[str]]:
        """Return the names, and those of them that only `chosen` makes control tokens."""
        names, alone = (names_in(self._document, each, text_tokens) for each in (chosen, set()))
        unknown_names = sorted(text_tokens - names.text.keys())
        if unknown_names:
            raise ValueError(f"text_tokens must be added tokens or control names of {file}, got {unknown_names}.")
        return names, sorted(names.control - alone.control)

    def _rewritten(self, *, detecting: bool) -> Any:
        document = rewritten(self._document, self._names, self.vocab_size, detecting=detecting)
        return _load(json.dumps(document).encode(), "the rewritten tokenizer")

    def _token_id(self, token: str | None, name: str, file: Path) -> int | None:
        if token is None:
            return None
        number: int | None = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{name} must be a token of {file}, got {token!r}. Look for it under added_tokens there.")
        return number


def _control_ids(tokenizer: Any, names: Names, unk_id: int | None, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Return a mask over all ids: True for control and added tokens; what the model does not know is of no name."""
    mask = np.zeros(vocab_size, dtype=np.bool_)
    mask[[number for name in names.control if (number := tokenizer.token_to_id(name)) is not None]] = True
    if unk_id is not None:
        mask[unk_id] = False
    return mask


def _marked(spans: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
    """Return a mask over `length` characters: True inside any of the spans, int64 [N, 2]."""
    changes = np.zeros(length + 1, dtype=np.int64)
    np.add.at(changes, spans[:, 0], 1)
    np.add.at(changes, spans[:, 1], -1)
    return np.cumsum(changes)[:length] > 0


def _load(content: bytes, name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("HFTokenizer needs the package tokenizers. Run pip install titan-data[hf].") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ValueError(
            f"{name} must be a tokenizer.json of the tokenizers library, got what it cannot read ({error}). A file of "
            f"tiktoken ranks is for TiktokenTokenizer."
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
    """Return the error for a text that `tokenizers` fails at."""
    return ValueError(f"The tokenizer must be able to encode any text, got an error: {error}")


def _file(path: Path) -> Path:
    """Return the file at `path`, or `tokenizer.json` in that folder.

    Raises ValueError for a link out of its folder, as a downloaded folder may hold one, except into the `blobs` of a
    hub cache.
    """
    file = find_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    target, folder = file.resolve(), file.parent.resolve()
    if file.is_symlink() and folder not in target.parents and target.parent.name != "blobs":
        raise ValueError(
            f"{file} must be in its folder, got a link to {target}. If that file is meant, name it itself."
        )
    return file
