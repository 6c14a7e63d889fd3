"""The global order of documents: a function of the seed alone, with no memory and no regard to ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import math

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
    (seed, epoch), permutes a rectangle just large enough; what lands outside is sent through again until it is inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains": generalized Feistel, cycle walking).
    """
    epochs, documents = positions // np.uint64(count), positions % np.uint64(count)
    keys = _mixed(epochs ^ _seed_key(seed))
    width = math.isqrt(count - 1) + 1
    height = -(-count // width)
    outside = np.arange(len(documents))
    while len(outside):
        documents[outside] = _feistel(documents[outside], keys[outside], np.uint64(width), np.uint64(height))
        outside = outside[documents[outside] >= count]
    return documents


def _feistel(values: Uint64s, keys: Uint64s, width: np.uint64, height: np.uint64) -> Uint64s:
    """Permute 0 .. width * height - 1: column and row, each shifted in turn by a hash of the other."""
    column, row = values % width, values // width
    for number in range(1, 2 * NUM_ROUNDS, 2):  # hashes of their own for each round, or small domains come out skewed
        column = (column + _mixed(row + keys * np.uint64(number)) % width) % width
        row = (row + _mixed(column - keys * np.uint64(number)) % height) % height
    return row * width + column


def _mixed(values: Uint64s) -> Uint64s:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): 64 bits to 64 bits, each depending on all; wraps around."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _seed_key(seed: int) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed of its own for an epoch, for orders that somebody else shuffles."""
    return int(_mixed(np.array([epoch], np.uint64) ^ _seed_key(seed))[0])
