"""Names of special tokens in the files that transformers writes next to a `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("tokenizer_config.json", "special_tokens_map.json")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def special_names_beside(tokenizer: Path) -> set[str]:
    """Return the special tokens in `tokenizer_config.json` and `special_tokens_map.json` in the folder of `tokenizer`.

    They are the values of `added_tokens_decoder`, of all `*_token` keys, and of the lists of additional tokens. White
    space and single characters (CLIP pads with `!`) are not included: they are text. Raises ValueError for a file that
    is not a JSON object.
    """
    found: set[str] = set()
    for name in FILES:
        file = tokenizer.parent / name
        if file.is_file():
            found |= _names_in(_read(file))
    return {name for name in found if len(name) > 1 and not name.isspace()}


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be a JSON object, got invalid JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must be a JSON object, got a {type(settings).__name__}.")
    return settings


def _names_in(settings: dict[str, Any]) -> set[str]:
    tokens = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("added_tokens_decoder", *_LISTS):
        several = settings.get(key)
        tokens += several.values() if isinstance(several, dict) else several if isinstance(several, list) else []
    contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return {content for content in contents if isinstance(content, str)}
