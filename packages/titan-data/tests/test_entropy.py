import json
import math
from collections import Counter

import pytest
from titan_data import ByteTokenizer, JsonlSource, unigram_entropy


def test_unigram_entropy_matches_the_token_counts(tmp_path):
    texts = ["abracadabra", "banana", "äöü"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = ByteTokenizer.Config().build()
    counts = Counter(byte for text in texts for byte in text.encode())
    if tokenizer.eos_id is not None:
        counts[tokenizer.eos_id] += len(texts)
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert unigram_entropy(JsonlSource.Config(path=file).build(), tokenizer) == pytest.approx(expected, rel=1e-12)


def test_the_entropy_of_one_repeated_token_is_zero(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "aaaa"}) + "\n")
    tokenizer = ByteTokenizer.Config().build()
    tokenizer.eos_id = None
    assert unigram_entropy(JsonlSource.Config(path=file).build(), tokenizer) == 0.0
