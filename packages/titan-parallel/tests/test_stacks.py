"""Stacked expert matrices under tensor parallelism, each rank with some features of all experts; auxiliary losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import check_parallel
from titan_parallel.check import meshes
from titan_parallel.sharding_plan.roles import Roles
from titan_parallel.sharding_plan.validation import check_can_be_split
from titan_parallel.step.auxiliary_losses import AuxiliaryLosses
from titan_parallel.tensor_parallel.apply import TensorParallel
from torch import nn

EXPERTS, WIDTH, HIDDEN = 3, 16, 24


class Stack(nn.Module):
    """`x W_e^T + b_e` for the tokens of each expert, `[E, N, I] -> [E, N, O]`; `transposed` weights are `[E, I, O]`."""

    def __init__(self, in_features: int, out_features: int, transposed: bool) -> None:
        super().__init__()
        weight = torch.randn(EXPERTS, out_features, in_features) / in_features**0.5
        self.weight = nn.Parameter(weight.transpose(1, 2).contiguous() if transposed else weight)
        self.bias = nn.Parameter(torch.randn(EXPERTS, out_features))
        self.transposed = transposed

    def forward(self, x):
        return x @ (self.weight if self.transposed else self.weight.mT) + self.bias.unsqueeze(1)


class AuxiliaryLoss(nn.Module):
    scale = None
    share = 1.0

    def forward(self, x, loss_sum):
        return x if self.scale is None else AddLoss.apply(x, loss_sum * self.scale * self.share)


class AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_ones(())


class Mixture(nn.Module):
    """A mixture in which every expert sees every token, weighted by router scores, with an auxiliary loss."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.auxiliary_loss = AuxiliaryLoss()
        self.up, self.down = Stack(WIDTH, HIDDEN, transposed), Stack(HIDDEN, WIDTH, transposed)

    def forward(self, x):
        logits = self.router(x)
        weights = self.auxiliary_loss(logits.softmax(-1), logits.logsumexp(-1).square().sum())
        made = self.down(self.up(x.flatten(0, 1).expand(EXPERTS, -1, -1)).relu())
        return (made.unflatten(1, x.shape[:2]) * weights.movedim(-1, 0).unsqueeze(-1)).sum(0)


class Layer(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.norm, self.mixture = nn.RMSNorm(WIDTH), Mixture(transposed)

    def forward(self, x):
        return x + self.mixture(self.norm(x))


class Model(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.layers = nn.Sequential(Layer(transposed), Layer(transposed))

    def forward(self, ids):
        return self.head(self.layers(self.words(ids)))


def roles(transposed: bool = False):
    how = {"transposed": True} if transposed else {}
    return {
        "words": "embedding",
        "layers.*": "block",
        "layers.*.mixture": "region",
        "layers.*.mixture.auxiliary_loss": "auxiliary_loss",
        "layers.*.mixture.up": ("colwise", how),
        "layers.*.mixture.down": ("rowwise", how),
        "head": "head",
    }


def build(transposed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Model(transposed)


@pytest.mark.parametrize("transposed", [False, True], ids=["out, in", "in, out"])
def test_stacks_are_split_along_the_features_of_each_matrix(transposed):
    names = ("tp2", "tp2_sp", "fsdp2_tp2_sp")
    report = check_parallel(lambda: build(transposed), meshes(*names), roles=roles(transposed), steps=2)
    assert report.ok, report


def whole_losses_on_each_rank(monkeypatch):
    init = AuxiliaryLosses.__init__

    def of_one_rank(self, model, roles, *, tp_size, device_type):
        init(self, model, roles, tp_size=1, device_type=device_type)

    monkeypatch.setattr(AuxiliaryLosses, "__init__", of_one_rank)
    return "router.bias"


def biases_of_all_ranks(monkeypatch):
    monkeypatch.setattr(TensorParallel, "_find_slices", lambda self: {})
    return "down.bias"


@pytest.mark.parametrize("sabotage", [whole_losses_on_each_rank, biases_of_all_ranks])
def test_values_counted_once_per_rank_are_detected(monkeypatch, sabotage):
    found = sabotage(monkeypatch)
    report = check_parallel(build, meshes("tp2_sp"), roles=roles(), steps=1)
    assert found in str(report), report


def test_a_weight_with_four_dims_raises():
    model = build()
    model.layers[0].mixture.up.weight = nn.Parameter(torch.randn(EXPERTS, 2, 12, WIDTH))
    dims = SimpleNamespace(tp_size=2, sequence_parallel=True)
    with pytest.raises(ConfigError, match=r"a stack of matrices.* shape \[3, 2, 12, 16\] in layers.0.mixture.up"):
        check_can_be_split(model, Roles(model, roles()), dims)
