"""Counter-based random numbers keyed by (seed, name, position), the same bits on any mesh.

The last two dims of a tensor are divided into tiles of 128 x 128; with fewer than 128 rows, tiles have all rows (a
vector counts as one row). Each tile has a range of the counter of a Philox generator, whose 128-bit key is a hash of
seed and name, so that each tile can be generated independently. Tiles are generated whole, in fp32, on the CPU. The
tiling is a format: another tiling gives other weights.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), in numpy's 4x64-10 variant.
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
_TILES_AT_ONCE = 16  # 1 MiB, so that the numbers stay in the CPU cache until the copy
_NUMBERS_PER_COUNT = 8  # each count of Philox 4x64 gives 4 x 64 bits, and each 64 bits give two numbers


@dataclass(frozen=True)
class ShardLocation:
    """The location of a shard: the `key` of its tensor, the global `shape`, and the `offsets` of the shard in each dim.

    `layer` is the number of the layer of the tensor. None: the tensor belongs to no numbered layer.
    """

    key: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    layer: int | None = None


def key_of(seed: int, name: str) -> int:
    """Return the 128-bit key of the generator for the tensor `name` and `seed`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")


def uniform(key: int, first: int, count: int) -> Tensor:
    """Return `count` random numbers of the stream `key` from number `first` on: fp32, uniform in (-1, 1).

    `first` and `count` must be multiples of 8. The numbers are odd multiples of 2^-24: symmetric, and never -1, 0 or 1.
    """
    raw = np.random.Philox(key=key, counter=first // _NUMBERS_PER_COUNT).random_raw(count // 2)
    bits = torch.from_numpy(raw.astype("<u8", copy=False).view("<i4"))
    return bits.bitwise_right_shift_(8).to(torch.float32).add_(0.5).mul_(2.0**-23)


def fill_with_uniform_(local: Tensor, location: ShardLocation, transform: Callable[[Tensor], Tensor]) -> None:
    """Fill `local` with `transform` of the uniform random numbers at `location`, cast to the dtype of `local`.

    `transform` must be elementwise and may work in place. It is always called with whole tiles, so that each rank
    computes the same bits.
    """
    if local.numel() == 0:
        return
    if len(location.shape) == 1:
        local = local[None]
        location = ShardLocation(location.key, (1, *location.shape), (0, *location.offsets))
    for index in np.ndindex(*local.shape[:-2]):
        matrix = 0
        for size, offset, step in zip(location.shape[:-2], location.offsets[:-2], index, strict=True):
            matrix = matrix * size + offset + step
        _fill_matrix_(local[index], location, matrix, transform)


def _fill_matrix_(
    local_RC: Tensor, location: ShardLocation, matrix: int, transform: Callable[[Tensor], Tensor]
) -> None:
    """Fill a shard of matrix number `matrix` of the tensor, up to 16 tiles of a row of tiles at a time."""
    rows, columns = location.shape[-2:]
    top, left = location.offsets[-2:]
    bottom, right = top + local_RC.shape[0], left + local_RC.shape[1]
    height = min(TILE, rows)
    tiles_down, tiles_across = math.ceil(rows / height), math.ceil(columns / TILE)
    last = math.ceil(right / TILE)
    for i in range(top // height, math.ceil(bottom / height)):
        for j in range(left // TILE, last, _TILES_AT_ONCE):
            num_tiles = min(_TILES_AT_ONCE, last - j)
            first = (matrix * tiles_down + i) * tiles_across + j
            tiles = transform(uniform(location.key, first * height * TILE, num_tiles * height * TILE))
            band = tiles.view(num_tiles, height, TILE).transpose(0, 1).reshape(height, num_tiles * TILE)
            row, column = i * height, j * TILE  # offsets of the band in the matrix
            r0, r1 = max(top, row), min(bottom, row + height)
            c0, c1 = max(left, column), min(right, column + num_tiles * TILE)
            local_RC[r0 - top : r1 - top, c0 - left : c1 - left] = band[r0 - row : r1 - row, c0 - column : c1 - column]
