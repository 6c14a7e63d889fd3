"""Mixed precision rounds what meets weights, and nothing else: times and positions arrive as they are given."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from titan_parallel import MixedPrecision, ParallelDims, parallelize
from torch import nn

WIDTH = 16


class Seen:
    """The dtypes that tensors had at places of the model, and values of the positions."""

    def __init__(self):
        self.dtypes, self.positions = {}, None

    def note(self, **tensors):
        self.dtypes |= {name: tensor.dtype for name, tensor in tensors.items()}


class Block(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen, self.norm = seen, nn.LayerNorm(WIDTH)
        self.up, self.condition = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, condition, tables=None, ids=None):
        cos, (sin, positions) = tables["cos"], tables["rest"]
        self.seen.note(stream=x, condition=condition, cos=cos, sin=sin, positions=positions, ids=ids)
        self.seen.positions = positions
        mixed = self.up(self.norm(x)) * cos + self.condition(condition).unsqueeze(1) * sin
        return x + mixed.to(x.dtype)


class Model(nn.Module):
    """Of images and times, with a scale of its own beside its modules."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.scale = seen, nn.Parameter(torch.ones(1, 1, WIDTH))
        self.image, self.time = nn.Linear(4, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.register_buffer("frequencies", torch.linspace(0.1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(seen) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, image, time, positions, ids):
        self.seen.note(time=time, image=image, frequencies=self.frequencies)
        angles = positions.unsqueeze(-1) * self.frequencies
        waves = (1000 * time[:, None] * self.frequencies).sin()
        self.time(waves)
        tables = {"cos": angles.cos(), "rest": (angles.sin(), positions)}
        x = self.image(image) * self.scale
        for block in self.blocks:
            x = block(condition=waves, x=x, tables=tables, ids=ids)
        return self.head(x)


def loss(head, hidden, targets):
    return (head(hidden).float() - targets["image"]).square().sum(), torch.tensor(1)


EXPECTED = {
    "image": torch.float32,
    "time": torch.float32,
    "frequencies": torch.float32,
    "stream": torch.bfloat16,
    "condition": torch.float32,
    "cos": torch.float32,
    "sin": torch.float32,
    "positions": torch.float32,
    "ids": torch.int64,
}


def test_inputs_arrive_as_given_and_the_stream_of_blocks_is_cast(run_ranks):
    def run(stored, degrees):
        seen = Seen()
        model = Model(seen)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored)
        dims = ParallelDims.Config(**degrees).build(world_size=torch.distributed.get_world_size(), device_type="cpu")
        roles = {"blocks.*": "block", "head": "head"}
        parallel = parallelize(model, roles, dims, mixed_precision=MixedPrecision.Config())
        image, positions = torch.randn(4, 6, 4), 257 + torch.arange(6.0).expand(4, 6)
        inputs = {"image": image, "time": torch.rand(4), "positions": positions, "ids": torch.arange(4)}
        batch = SimpleNamespace(inputs=inputs, targets={"image": image}, sequence_dims={})
        parallel.forward_backward([batch, batch], loss, 1)
        assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("time."))
        return seen.dtypes, torch.equal(seen.positions, positions)

    def run_all():
        stages = [{"pipeline_parallel_degree": 2}] if torch.distributed.get_world_size() > 1 else []
        return [run(stored, degrees) for stored in (torch.float32, torch.bfloat16) for degrees in ({}, *stages)]

    for ranks in (1, 2):
        for of_rank in run_ranks(ranks, run_all):
            for dtypes, exact in of_rank:
                assert dtypes == EXPECTED and exact
