from __future__ import annotations

import numpy as np
import pytest
from titan_data.order import epoch_seed, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 63, 64, 65, 1000])
def test_every_epoch_holds_every_document_once(count: int) -> None:
    positions = np.arange(3 * count, dtype=np.uint64)
    epochs = shuffled(positions, count, seed=0).reshape(3, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()


def test_every_epoch_and_seed_has_a_different_order() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(shuffled(np.arange(100, dtype=np.uint64) + np.uint64(100 * epoch), 100, seed).tolist())

    orders = {order(seed, epoch) for seed in (0, 1, -1, 1 << 100) for epoch in range(5)}
    assert len(orders) == 20
    assert tuple(range(100)) not in orders


def test_an_order_looks_random() -> None:
    orders = shuffled(np.arange(2000 * 10, dtype=np.uint64), 10, seed=3).reshape(2000, 10)
    counts = np.array([np.bincount(column, minlength=10) for column in orders.T.astype(int)])
    assert abs(counts - 200).max() < 70  # each document at each place about 200 times; 5 standard deviations
    followers = sum((row[1:] == (row[:-1] + np.uint64(1)) % np.uint64(10)).sum() for row in orders)
    assert abs(followers - 2000) < 200


def test_a_position_has_the_same_document_alone_or_among_many() -> None:
    positions = np.arange(500, dtype=np.uint64)
    together = shuffled(positions, 37, seed=5)
    alone = [int(shuffled(positions[place : place + 1], 37, seed=5)[0]) for place in range(500)]
    assert together.tolist() == alone


def test_the_order_is_part_of_the_format() -> None:
    """Golden values: a saved run continues in the same order after an upgrade."""
    assert shuffled(np.arange(12, dtype=np.uint64), 6, seed=0).tolist() == [4, 1, 0, 2, 3, 5, 0, 3, 5, 1, 4, 2]
    assert epoch_seed(0, 1) == 16614272907694420121
