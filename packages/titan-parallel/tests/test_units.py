"""Shared modules and weights that are read outside their module: correct on any mesh, or a clear error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import FullActivationCheckpoint, ParallelDims, check_parallel, parallelize
from titan_parallel.check import meshes
from torch import nn
from torch.nn import functional as F

WIDTH, VOCABULARY = 16, 24


class Block(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.own = nn.Linear(WIDTH, WIDTH)
        self.shared = shared

    def forward(self, x):
        x = x + torch.tanh(self.own(x))
        return x if self.shared is None else x + self.shared(x)


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.words, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ROLES = {"words": "embedding", "layers.*": "block", "head": "head"}


def sharing_a_module():
    shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    return Model([Block(), Block(shared), Block(), Block(shared)])


def one_block_in_several_places():
    block = Block()
    return Model([block, Block(), block])


@pytest.mark.parametrize("build", [sharing_a_module, one_block_in_several_places])
def test_modules_shared_by_blocks_equal_the_plain_model(build):
    report = check_parallel(
        build, meshes("fsdp2"), roles=ROLES, activation_checkpoint=FullActivationCheckpoint.Config()
    )
    assert report.ok, report


class TiedByFunction(Model):
    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.words.weight)


def test_weights_that_fsdp_cannot_gather_raise_on_every_rank(run_ranks):
    def run():
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        model = Model([Block(), Block()])
        model.layers[1].own.weight = model.layers[0].own.weight
        with pytest.raises(ConfigError, match=r"must not share .* got layers.1.own.weight, which is also layers.0.own"):
            parallelize(model, ROLES, dims)
        roles = {name: role for name, role in ROLES.items() if name != "head"}
        parallel = parallelize(TiedByFunction([Block(), Block()]), roles, dims)
        with pytest.raises(ConfigError, match=r"read within the forward of that module.* with a role: words"):
            parallel.model(torch.zeros(2, 3, dtype=torch.long))

    run_ranks(2, run)


def test_a_head_that_reads_the_weight_of_an_embedding_without_a_role():
    roles = {"layers.*": "block"}

    def build():
        model = TiedByFunction([Block(), Block()])
        del model.head
        return model

    ids = torch.randint(VOCABULARY, (8, 6))
    batch = SimpleNamespace(inputs={"ids": ids}, targets={"labels": ids.roll(-1, 1)}, sequence_dims={})
    report = check_parallel(build, meshes("fsdp2"), roles=roles, batch=batch, steps=1)
    assert report.ok, report
