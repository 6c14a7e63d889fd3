"""The global order of documents: a function of the seed alone, with no memory and no regard to ranks."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

Uint64s = npt.NDArray[np.uint64]

NUM_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Order:
    """How the documents of a source follow each other.

    seed: decides the order; `shuffle`: a new one in every epoch, or the source's own; `infinite`: one epoch after the
    other, or a single one.
    """

    seed: int
    shuffle: bool
    infinite: bool


def shuffled(positions: Uint64s, count: int, seed: int) -> Uint64s:
    """Return the document (0 to `count` - 1) at each position of the endless order, uint64 as `positions`.

    Epoch e holds positions e * count to (e + 1) * count - 1 and every document once. A Feistel network, keyed by
    (seed, epoch), permutes the next power of two; what lands outside is sent through again until it is inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
    """
    epochs, documents = positions // np.uint64(count), positions % np.uint64(count)
    keys = _mixed(epochs ^ _seed_key(seed))
    bits = (count - 1).bit_length()
    outside = np.arange(len(documents))
    while len(outside):
        documents[outside] = _feistel(documents[outside], keys[outside], bits)
        outside = outside[documents[outside] >= count]
    return documents


def _feistel(values: Uint64s, keys: Uint64s, bits: int) -> Uint64s:
    """Permute 0 .. 2**bits - 1: two halves, each changed in turn by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = _mask(bits // 2), _mask(bits - bits // 2)
    low, high = values & low_mask, values >> low_bits
    for number in range(NUM_ROUNDS):
        low = low ^ (_mixed(high + keys + np.uint64(2 * number)) & low_mask)
        high = high ^ (_mixed(low + keys + np.uint64(2 * number + 1)) & high_mask)
    return (high << low_bits) | low


def _mixed(values: Uint64s) -> Uint64s:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): 64 bits to 64 bits, each depending on all; wraps around."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _seed_key(seed: int) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed of its own for an epoch, for orders that somebody else shuffles."""
    return int(_mixed(np.array([epoch], np.uint64) ^ _seed_key(seed))[0])
