"""Random numbers that depend on (seed, name, place) alone: the same bits on any mesh, drawn only where they are kept.

The last two dims of a tensor are cut into tiles of 128 x 128 (of all rows, where there are fewer; a vector is one row).
Each tile owns a range of the counter of a Philox generator whose 128-bit key is a hash of seed and name, so that any
tile can be drawn by itself. Tiles are drawn whole, in fp32, on the CPU. They are a format: other tiles, other weights.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), in numpy's 4x64-10 form.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE = 128
_TILES_AT_ONCE = 16  # a megabyte stays in the cache from the draw to the copy
_NUMBERS_PER_COUNT = 8  # each count of Philox 4x64 makes four times 64 bits, two numbers in each


@dataclass(frozen=True)
class Place:
    """Which part of which tensor: `key` of the tensor, its global `shape`, and where the part begins in each dim.

    `layer` is the number of the layer that the tensor is in. None: it is in none.
    """

    key: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    layer: int | None = None


def key_of(seed: int, name: str) -> int:
    """The generator's 128-bit key for the tensor `name` in a run with `seed`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")


def uniform(key: int, first: int, count: int) -> Tensor:
    """`count` numbers of the stream `key`, from number `first` on (multiples of 8): fp32, uniform in (-1, 1).

    They are odd multiples of 2^-24: symmetric, and never -1, 0 or 1.
    """
    raw = np.random.Philox(key=key, counter=first // _NUMBERS_PER_COUNT).random_raw(count // 2)
    bits = torch.from_numpy(raw.astype("<u8", copy=False).view("<i4"))
    return bits.bitwise_right_shift_(8).to(torch.float32).add_(0.5).mul_(2.0**-23)


def fill_with_uniform_(local: Tensor, place: Place, transform: Callable[[Tensor], Tensor]) -> None:
    """Fill `local` with `transform` of its tensor's uniform numbers, cast and copied to its dtype and device.

    `transform` is elementwise, may work in place, and always gets whole tiles: it computes the same for whoever asks.
    """
    if local.numel() == 0:
        return
    if len(place.shape) == 1:
        local, place = local[None], Place(place.key, (1, *place.shape), (0, *place.offsets))
    for index in np.ndindex(*local.shape[:-2]):
        matrix = 0
        for size, offset, step in zip(place.shape[:-2], place.offsets[:-2], index, strict=True):
            matrix = matrix * size + offset + step
        _fill_matrix_(local[index], place, matrix, transform)


def _fill_matrix_(local_RC: Tensor, place: Place, matrix: int, transform: Callable[[Tensor], Tensor]) -> None:
    """Fill this part of a tensor's matrix number `matrix`, a few tiles of one row of tiles at a time."""
    rows, columns = place.shape[-2:]
    top, left = place.offsets[-2:]
    bottom, right = top + local_RC.shape[0], left + local_RC.shape[1]
    height = min(TILE, rows)
    tiles_down, tiles_across = math.ceil(rows / height), math.ceil(columns / TILE)
    last = math.ceil(right / TILE)
    for i in range(top // height, math.ceil(bottom / height)):
        for j in range(left // TILE, last, _TILES_AT_ONCE):
            num_tiles = min(_TILES_AT_ONCE, last - j)
            first = (matrix * tiles_down + i) * tiles_across + j
            tiles = transform(uniform(place.key, first * height * TILE, num_tiles * height * TILE))
            band = tiles.view(num_tiles, height, TILE).transpose(0, 1).reshape(height, num_tiles * TILE)
            row, column = i * height, j * TILE  # where the band begins in the matrix
            r0, r1 = max(top, row), min(bottom, row + height)
            c0, c1 = max(left, column), min(right, column + num_tiles * TILE)
            local_RC[r0 - top : r1 - top, c0 - left : c1 - left] = band[r0 - row : r1 - row, c0 - column : c1 - column]
