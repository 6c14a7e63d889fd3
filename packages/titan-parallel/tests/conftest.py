"""A small transformer for tests, batches for it, and the plain loop that every mesh is judged against.

B batch, T tokens, D width, H heads, G key-value heads, K head dim, N tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # these two take a second: once here, and not in every forked rank
import torch.distributed.fsdp
from titan_parallel import ParallelDims, ParallelModel, cross_entropy, parallelize, per_token
from titan_parallel.check.tolerances import compare, norm_of
from titan_parallel.testing import check_same_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("OMP_NUM_THREADS", "1")
# full_tensor() of the judge gathers one mesh axis after the other, and says each time that this is slow
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Shape:
    layers: int = 2
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 48
    vocab: int = 64
    tied: bool = False


class Attention(nn.Module):
    """Grouped-query attention with biases, and a norm that only queries have."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.heads * self.head_dim)
        self.k = nn.Linear(shape.width, shape.kv_heads * self.head_dim)
        self.v = nn.Linear(shape.width, shape.kv_heads * self.head_dim)
        self.out = nn.Linear(shape.heads * self.head_dim, shape.width)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        q, k, v = (projection(x_BTD).unflatten(-1, (-1, self.head_dim)) for projection in (self.q, self.k, self.v))
        q = self.q_norm(q) * torch.cos(positions_BT * 0.1).to(q.dtype)[..., None, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(o.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden)
        self.gate = nn.Linear(shape.width, shape.hidden)
        self.down = nn.Linear(shape.hidden, shape.width)

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
        self.head = nn.Linear(shape.width, shape.vocab)
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

TENSOR_2 = {"tensor_parallel_degree": 2}
MESHES = {
    "one": (1, {}),
    "fsdp2": (2, {}),
    "fsdp2_once": (2, {"fsdp_reduce_gradients": "once"}),
    "ddp2": (2, {"data_parallel_replicate_degree": 2}),
    "tp2": (2, {**TENSOR_2, "sequence_parallel": False, "loss_parallel": False}),
    "tp2_loss": (2, {**TENSOR_2, "sequence_parallel": False}),
    "tp2_sequence": (2, {**TENSOR_2, "loss_parallel": False}),
    "tp2_both": (2, TENSOR_2),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"data_parallel_replicate_degree": 2}),
    "fsdp2_tp2": (4, TENSOR_2),
    "fsdp2_tp2_once": (4, {**TENSOR_2, "fsdp_reduce_gradients": "once"}),
    "ddp2_tp2": (4, {**TENSOR_2, "data_parallel_replicate_degree": 2}),
}
"""name -> (ranks, degrees)"""


@dataclass
class TextBatch:
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_dims: dict[str, int] = field(default_factory=lambda: {"tokens": 1, "positions": 1, "labels": 1})

    def rows(self, start: int, stop: int) -> TextBatch:
        parts = ({name: tensor[start:stop] for name, tensor in part.items()} for part in (self.inputs, self.targets))
        return TextBatch(*parts)

    def turned(self, count: int) -> TextBatch:
        """With its first rows last: what sums over rows adds them in another order."""
        inputs, targets = ({n: t.roll(-count, 0) for n, t in part.items()} for part in (self.inputs, self.targets))
        return TextBatch(inputs, targets, self.sequence_dims)


def make_batch(rows: int = 8, length: int = 12, vocab: int = 64, seed: int = 1) -> TextBatch:
    """Random tokens; each row has another number of valid labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    labels = torch.randint(vocab, (rows, length), generator=generator)
    for row in range(rows):
        labels[row, length - row :] = -100
    positions = torch.arange(length).expand(rows, length).contiguous()
    return TextBatch({"tokens": tokens, "positions": positions}, {"labels": labels})


def make_model(shape: Shape | None = None, dtype: torch.dtype = torch.float64) -> Transformer:
    """The same weights on every call, drawn in fp64; norms and biases away from their trivial values."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(shape or Shape()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() == 2 else 0.5 + noise * 0.2)
    return model.to(dtype)


def make_dims(mesh: str) -> ParallelDims:
    world_size, degrees = MESHES[mesh]
    return ParallelDims.Config(**degrees).build(world_size=world_size, device_type="cpu")


def put_on(mesh: str, model: nn.Module, **options) -> ParallelModel:
    return parallelize(model, ROLES, make_dims(mesh), **options)


def micro_batches(batch: TextBatch, dims: ParallelDims, number: int = 1) -> list[TextBatch]:
    """This data rank's rows of a global batch, in `number` parts."""
    rows = len(batch.targets["labels"]) // dims.dp_size
    first, step = dims.dp_rank * rows, rows // number
    return [batch.rows(first + i * step, first + (i + 1) * step) for i in range(number)]


def plain_step(model: nn.Module, batch: TextBatch) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss sum, gradients of the mean loss, and count of labels, without any of this package."""
    model = copy.deepcopy(model)
    labels = batch.targets["labels"]
    count = int((labels != -100).sum())
    logits = model(**batch.inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (loss / count).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, count


@dataclass(frozen=True)
class Reference:
    """A step of the plain loop in fp64, and its rounding in another dtype: what other orders of rows give in it."""

    loss: Tensor
    gradients: dict[str, Tensor]
    count: int
    rounded: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)

    @property
    def norm(self) -> Tensor:
        return norm_of(self.gradients.values())

    def check_gradients(self, found: dict[str, Tensor], scale: float = 1.0) -> None:
        """`found` may have a part of them; they are `scale` times the reference."""
        runs = [gradients for _, gradients in self.rounded]
        expected, *plain = ({name: scale * run[name] for name in found} for run in (self.gradients, *runs))
        check_same_gradients(found, expected, plain)

    def check_loss(self, found: Tensor) -> None:
        self._check(found, self.loss, [loss for loss, _ in self.rounded])

    def check_norm(self, found: Tensor) -> None:
        self._check(found, self.norm, [norm_of(gradients.values()) for _, gradients in self.rounded])

    def _check(self, found: Tensor, expected: Tensor, rounded: list[Tensor]) -> None:
        rounding = max((float((each.double() - expected).abs()) for each in rounded), default=None)
        compared = compare(found.to(rounded[0].dtype if rounded else torch.float64), expected, expected.abs(), rounding)
        assert compared.same, f"{found} is not {expected}: {compared}"


def refer(model: nn.Module, batch: TextBatch, dtype: torch.dtype = torch.float64) -> Reference:
    """What a step of the model gives in fp64, with its rounding in `dtype`; the model may be in a wider one."""
    reference = Reference(*plain_step(copy.deepcopy(model).double(), batch))
    if dtype is not torch.float64:
        turned = (batch.turned(count) for count in (0, 1, len(batch.targets["labels"]) // 2))
        reference.rounded.extend(plain_step(copy.deepcopy(model).to(dtype), each)[:2] for each in turned)
    return reference


@per_token
def chunked_loss(head, hidden: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits in two chunks, each made again in the backward."""

    def chunk_loss(hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        return cross_entropy(head(hidden_ND), labels_N)

    labels = targets["labels"].flatten()
    chunks = zip(hidden.flatten(0, -2).chunk(2), labels.chunk(2), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks), (labels != -100).sum()


@pytest.fixture(scope="session")
def small(in_fp64) -> SimpleNamespace:
    """The small transformer and all that belongs to it."""
    return SimpleNamespace(
        in_fp64=in_fp64,
        Shape=Shape,
        Transformer=Transformer,
        FeedForward=FeedForward,
        ROLES=ROLES,
        MESHES=MESHES,
        TextBatch=TextBatch,
        make_batch=make_batch,
        make_model=make_model,
        make_dims=make_dims,
        put_on=put_on,
        micro_batches=micro_batches,
        plain_step=plain_step,
        refer=refer,
        chunked_loss=chunked_loss,
    )


@pytest.fixture
def on_one_rank(run_ranks) -> Callable[..., Any]:
    """Call a function on one rank, in a process of its own, and return its result."""
    return lambda function, *args: run_ranks(1, function, *args)[0]
