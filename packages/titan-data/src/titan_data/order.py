"""The global order of documents: a function of the seed alone, computed without memory, independent of the ranks."""

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
    """The order in which the documents of a source are read.

    seed: determines the order. shuffle: a new order in every epoch if True, the order of the source if False.
    infinite: epoch after epoch if True, a single epoch if False.
    """

    seed: int
    shuffle: bool
    infinite: bool


def shuffled(positions: Uint64s, count: int, seed: int) -> Uint64s:
    """Return the index (0 to `count` - 1) of the document at each position of the infinite order, as uint64.

    Epoch e consists of positions e * count to (e + 1) * count - 1 and contains every document once. A Feistel network,
    keyed by (seed, epoch), permutes the smallest sufficient rectangle; values outside [0, count) are permuted again
    until they are inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains": generalized Feistel, cycle
    walking).
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
    """Permute 0 .. width * height - 1: shift column and row in turn, each by a hash of the other."""
    column, row = values % width, values // width
    for number in range(1, 2 * NUM_ROUNDS, 2):  # each round has its own hash; otherwise small domains are biased
        column = (column + _mixed(row + keys * np.uint64(number)) % width) % width
        row = (row + _mixed(column - keys * np.uint64(number)) % height) % height
    return row * width + column


def _mixed(values: Uint64s) -> Uint64s:
    """Hash 64 bits to 64 bits with the finalizer of SplitMix64 (Steele, Lea, Flood 2014); arithmetic modulo 2^64."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _seed_key(seed: int) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a separate seed for an epoch, for third-party shuffles (`datasets`)."""
    return int(_mixed(np.array([epoch], np.uint64) ^ _seed_key(seed))[0])
