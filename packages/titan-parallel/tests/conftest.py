"""A small transformer for tests, batches for it, and the plain loop that every mesh is judged against.

B batch, T tokens, D width, H heads, G key-value heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    layers: int = 2
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 48
    vocab: int = 64
    tied: bool = False
    bias: bool = True
    qk_norm: bool = True


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.heads * self.head_dim, bias=shape.bias)
        self.k = nn.Linear(shape.width, shape.kv_heads * self.head_dim, bias=shape.bias)
        self.v = nn.Linear(shape.width, shape.kv_heads * self.head_dim, bias=shape.bias)
        self.out = nn.Linear(shape.heads * self.head_dim, shape.width, bias=shape.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if shape.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        q = self.q_norm(q) * torch.cos(positions_BT * 0.1).to(q.dtype)[..., None, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(o.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden, bias=shape.bias)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=shape.bias)
        self.down = nn.Linear(shape.hidden, shape.width, bias=shape.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(shape), FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.feed_forward_norm = nn.LayerNorm(shape.width)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), positions_BT=positions_BT)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Transformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.vocab, bias=shape.bias)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens)
        for layer in self.layers:
            x_BTD = layer(x_BTD, positions)
        return self.head(self.norm(x_BTD))


ROLES = {
    "embedding": "embedding",
    "layers.*": "block",
    "layers.*.attention": "region",
    "layers.*.attention.q": ("colwise", {"num_heads": 4}),
    "layers.*.attention.k": ("colwise", {"num_kv_heads": 2}),
    "layers.*.attention.v": ("colwise", {"num_kv_heads": 2}),
    "layers.*.attention.out": "rowwise",
    "layers.*.feed_forward": "region",
    "layers.*.feed_forward.up": "colwise",
    "layers.*.feed_forward.gate": "colwise",
    "layers.*.feed_forward.down": "rowwise",
    "norm": "norm",
    "head": "head",
}


@dataclass
class TextBatch:
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_dims: dict[str, int] = field(default_factory=lambda: {"tokens": 1, "positions": 1, "labels": 1})

    def rows(self, start: int, stop: int) -> TextBatch:
        return TextBatch(
            {name: tensor[start:stop] for name, tensor in self.inputs.items()},
            {name: tensor[start:stop] for name, tensor in self.targets.items()},
        )


def make_batch(rows: int = 8, length: int = 12, vocab: int = 64, seed: int = 1) -> TextBatch:
    """Random tokens; each row has another number of valid labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    labels = torch.randint(vocab, (rows, length), generator=generator)
    for row in range(rows):
        labels[row, length - row :] = -100
    positions = torch.arange(length).expand(rows, length).contiguous()
    return TextBatch({"tokens": tokens, "positions": positions}, {"labels": labels})


def make_model(shape: Shape, dtype: torch.dtype = torch.float64) -> Transformer:
    """The same weights on every call, drawn in fp64; norms and biases away from their trivial values."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() == 2 else 0.5 + noise * 0.2)
    return model.to(dtype)


def plain_step(model: nn.Module, batch: TextBatch) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss sum, gradients of the mean loss, and count, in one process without any of this package."""
    model = copy.deepcopy(model)
    labels = batch.targets["labels"]
    count = int((labels != -100).sum())
    logits = model(**batch.inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (loss / count).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, count


@pytest.fixture(scope="session")
def small():
    """The small transformer and all that belongs to it."""
    return SimpleNamespace(
        Shape=Shape,
        Transformer=Transformer,
        ROLES=ROLES,
        TextBatch=TextBatch,
        make_batch=make_batch,
        make_model=make_model,
        plain_step=plain_step,
    )
