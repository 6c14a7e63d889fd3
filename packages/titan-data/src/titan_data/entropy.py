"""How predictable a text is from token frequencies alone: the mark a language model has to get below."""

from __future__ import annotations

import numpy as np

from titan_data.order import Order
from titan_data.source import Source
from titan_data.tokenizer import Tokenizer


def unigram_entropy(source: Source, tokenizer: Tokenizer) -> float:
    """Return the entropy of the single tokens of all documents of `source`, in nats per token.

    An EOS after each document is counted where the tokenizer has one. Reads the whole source once.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for document in source.stream(0, 1, 0, Order(seed=0, shuffle=False, infinite=False)):
        for ids in tokenizer.encode_parts(document.text):
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        if tokenizer.eos_id is not None:
            counts[tokenizer.eos_id] += 1
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
