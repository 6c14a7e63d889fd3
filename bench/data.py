"""Tokens per second of titan_data's loader on one core, from text to batches, with the debug tokenizer.

Documents are paragraphs of Austen, whole chapters, and one document of 4 MB. The baseline is tiktoken alone on the same
text; measurements of the two are interleaved.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import tiktoken
import torch
from sizes import sized
from titan_data import LLAMA3_PATTERN, JsonlSource, TiktokenTokenizer, TokenLoader

ASSETS = Path(__file__).parent.parent / "recipes" / "assets"
TOKENIZER = TiktokenTokenizer.Config(
    path=ASSETS / "austen.tiktoken", special_tokens={"<|end_of_text|>": 2047}, eos="<|end_of_text|>"
)
ROUNDS, TOKENS_PER_ROUND = sized((7, 3_000_000), (1, 5_000))
SEQ_LEN, BATCH_SIZE = sized((2048, 8), (64, 2))
NUM_CHAPTERS, BYTES_OF_ONE = sized((None, 4_000_000), (2, 20_000))


def documents() -> dict[str, list[str]]:
    """Return the same text split in three ways."""
    lines = (ASSETS / "austen/train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_CHAPTERS]
    chapters = [json.loads(line)["text"] for line in lines]
    paragraphs = [paragraph for chapter in chapters for paragraph in chapter.split("\n\n")]
    one = "\n\n".join(chapters * 3).encode()[:BYTES_OF_ONE].decode(errors="ignore")
    return {"paragraphs": paragraphs, "chapters": chapters, "one of 4 MB": [one]}


def pipeline_speed(loader: TokenLoader) -> float:
    """Return the tokens per second of loading and committing batches."""
    start, num_tokens = time.perf_counter(), 0
    while num_tokens < TOKENS_PER_ROUND:
        num_tokens += sum(batch.inputs["tokens"].numel() for batch in loader.next_batches(0, 1))
        loader.commit(loader.cursor_delta())
    return num_tokens / (time.perf_counter() - start)


def tiktoken_speed(encoding: tiktoken.Encoding, texts: list[str]) -> float:
    """Return the tokens per second of tiktoken alone, each text once."""
    start = time.perf_counter()
    num_tokens = sum(len(encoding.encode_to_numpy(text)) for text in texts)
    return num_tokens / (time.perf_counter() - start)


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    tokenizer = TOKENIZER.build()
    lines = Path(TOKENIZER.path).read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    encoding = tiktoken.Encoding(
        "debug", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=dict(TOKENIZER.special_tokens)
    )
    for name, texts in documents().items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text.jsonl")
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            loader = TokenLoader.Config(source=JsonlSource.Config(path=path), add_eos=True).build(
                tokenizer=tokenizer, seq_len=SEQ_LEN, global_batch_size=BATCH_SIZE, local_batch_size=BATCH_SIZE, seed=0
            )
            pairs = [(pipeline_speed(loader), tiktoken_speed(encoding, texts)) for _ in range(ROUNDS)]
            loader.close()
        titan, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{len(texts):5} documents ({name}): {titan / 1e6:.2f}M tokens/s,", end=" ")
        print(f"tiktoken {baseline / 1e6:.2f}M, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
