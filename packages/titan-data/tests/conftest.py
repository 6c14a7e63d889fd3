"""Fixtures: texts, JSONL files and a small tiktoken file."""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MERGES = ["th", "the", " the", "in", "ing", "an", "and", " and", "  ", "    ", " a", "e ", "\n\n", "ou", "you", " you"]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(texts, name="texts.jsonl")` writes one record per line and returns the path."""

    def write(texts: Sequence[str], name: str = "texts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def texts() -> list[str]:
    """Documents of 1 to 120 characters, some empty, and one much longer than a sequence."""
    rng = random.Random(0)
    words = ["the", "cat", "and", "dog", "sing", "you", "été", "12", "!"]
    lengths = [rng.randrange(0, 25) for _ in range(17)]
    documents = [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]
    return [*documents, "x", "", " ".join(rng.choice(words) for _ in range(150))]


@pytest.fixture
def ranks_file(tmp_path: Path) -> Path:
    """A tiktoken file with the 256 bytes and 16 merges, ids 0 to 271."""
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in MERGES]
    path = tmp_path / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path
