"""Unigram entropy of a data set: the loss of a prediction from token frequencies alone, as a baseline."""

from __future__ import annotations

import numpy as np

from titan_data.order import Order
from titan_data.source import Source
from titan_data.tokenizer import Tokenizer


def unigram_entropy(source: Source, tokenizer: Tokenizer) -> float:
    """Return the entropy of the token frequencies over all documents of `source`, in nats per token.

    If the tokenizer has an EOS token, one per document is counted. Reads the whole source once.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for document in source.stream(0, 1, 0, Order(seed=0, shuffle=False, infinite=False)):
        for ids in tokenizer.encode_parts(document.text):
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        if tokenizer.eos_id is not None:
            counts[tokenizer.eos_id] += 1
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
