"""Build the text and the tokenizer of the debug recipes: `python recipes/assets/make.py PATH/TO/austen.jsonl`.

Reads one JSON object per chapter (title, chapter, text) and writes to this folder: `austen/train.jsonl`,
`austen/validation.jsonl` (whole chapters that are not in the training text) and `austen.tiktoken` (a byte-level BPE,
trained on the training text). Needs `tokenizers`, and `tiktoken` for its checks. The output is deterministic.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from collections import Counter
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
TITLES = ("Pride and Prejudice", "Sense and Sensibility", "Persuasion")
VALIDATE_EVERY = 12  # chapters 12, 24, 36, ... of each novel are held out
VOCAB_SIZE = 2048  # the last id is END_OF_TEXT, the others are the ranks of the file
END_OF_TEXT = "<|end_of_text|>"
# Llama 3's pre-tokenization pattern.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(chapters: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return the training and the validation chapters, in the order of the novels."""
    chosen = [chapter for title in TITLES for chapter in chapters if chapter["title"] == title]
    train = [chapter for chapter in chosen if chapter["chapter"] % VALIDATE_EVERY != 0]
    validation = [chapter for chapter in chosen if chapter["chapter"] % VALIDATE_EVERY == 0]
    return train, validation


def write_jsonl(path: Path, chapters: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for chapter in chapters:
            record = {name: chapter[name] for name in ("title", "chapter", "text")}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def train_bpe(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's table from characters of the byte-level alphabet to bytes; printable Latin-1 maps to itself."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def write_tiktoken(path: Path, tokenizer: Tokenizer) -> None:
    """Write one line per token: its bytes in base64, and its rank, which is its id."""
    byte_of = byte_of_character()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n" for token, rank in tokens]
    path.write_text("".join(lines), encoding="ascii")


def check(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Check that the file gives the ids of the trained tokenizer and round-trips every text; print statistics."""
    ranks = load_tiktoken_bpe(str(path))
    specials = {END_OF_TEXT: VOCAB_SIZE - 1}
    encoding = tiktoken.Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    assert encoding.n_vocab == VOCAB_SIZE, f"vocabulary size must be {VOCAB_SIZE}, got {encoding.n_vocab}."
    counts: Counter[int] = Counter()
    for text in texts:
        ids = encoding.encode_ordinary(text)
        assert ids == tokenizer.encode(text).ids, "ids must be those of the trained tokenizer, got others."
        assert encoding.decode(ids) == text, "decode(encode(text)) must be the text, got another."
        counts.update([*ids, VOCAB_SIZE - 1])
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} chapters, {num_bytes:,} bytes, {total:,} tokens with one end of text per chapter")
    print(
        f"{num_bytes / total:.3f} bytes per token, unigram entropy {entropy:.4f} nats per token, "
        f"{len(counts)} ids in use"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="JSON lines, one chapter each: title, chapter, text")
    with parser.parse_args().corpus.open(encoding="utf-8") as file:
        train, validation = split([json.loads(line) for line in file])
    write_jsonl(HERE / "austen" / "train.jsonl", train)
    write_jsonl(HERE / "austen" / "validation.jsonl", validation)
    tokenizer = train_bpe([chapter["text"] for chapter in train])
    write_tiktoken(HERE / "austen.tiktoken", tokenizer)
    for chapters in (train, validation):
        check(HERE / "austen.tiktoken", tokenizer, [chapter["text"] for chapter in chapters])


if __name__ == "__main__":
    main()
