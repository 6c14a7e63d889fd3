"""Random generators continue on the same number of ranks, and are seeded deterministically on another."""

import random

import numpy as np
import torch
import torch.distributed as dist
from titan_ckpt import Checkpointer


def draw():
    return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist(), torch.randn(2).tolist()


def resumed(folder):
    rank = dist.get_rank()
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=folder)
    random.seed(-1)
    torch.manual_seed(99 + rank)
    np.random.seed(99)
    checkpointer.load({})
    return draw()


def saved(folder):
    rank = dist.get_rank()
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    draw()
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=folder)
    checkpointer.save(1, {}, last=True)
    return draw()


def test_generators_continue_after_a_resume(run_ranks, tmp_path):
    expected = run_ranks(2, saved, tmp_path)
    assert run_ranks(2, resumed, tmp_path) == expected
    assert expected[0] != expected[1]


def test_generators_on_another_number_of_ranks_are_seeded_deterministically(run_ranks, tmp_path):
    before = run_ranks(2, saved, tmp_path)
    first, second = run_ranks(1, resumed, tmp_path), run_ranks(1, resumed, tmp_path)
    assert first == second
    assert first[0] not in before
