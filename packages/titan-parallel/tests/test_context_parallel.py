"""Context parallel: gradients of the plain model, whatever the method, the mask, and what else splits the model.

B batch, T queries, S keys, H heads, K features of a head.
"""

from __future__ import annotations

import dataclasses
import traceback
from dataclasses import dataclass

import pytest
import torch
from titan_parallel import (
    Compile,
    EveryNthBlock,
    FullRecompute,
    ParallelDims,
    SelectiveRecompute,
    parallelize,
)
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn

METHODS = ["gather", "ulysses", "ring"]
LENGTH = 24


@dataclass(frozen=True)
class Mask:
    """Causal within documents, and within a window or a chunk."""

    query_positions: torch.Tensor
    key_positions: torch.Tensor
    query_documents: torch.Tensor | None
    key_documents: torch.Tensor | None
    window: int | None = None
    chunk: int | None = None

    def visible(self) -> torch.Tensor:
        q, k = self.query_positions[:, :, None], self.key_positions[:, None, :]
        visible = q >= k
        if self.query_documents is not None:
            visible &= self.query_documents[:, :, None] == self.key_documents[:, None, :]
        if self.window is not None:
            visible &= q - k < self.window
        if self.chunk is not None:
            visible &= q // self.chunk == k // self.chunk
        return visible


class Core(nn.Module):
    """Attention by all scores."""

    def realise(self, mask):
        return mask.visible()[:, None]

    def forward(self, q, k, v, mask, scale):
        return self.with_lse(q, k, v, mask, scale)[0]

    def with_lse(self, q, k, v, mask, scale):
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), 2) for x in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
        seen = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~seen, 0)
        output = torch.einsum("bhts,bshk->bthk", scores.softmax(-1).masked_fill(~seen, 0), v)
        lse = scores.logsumexp(-1).masked_fill(~seen[..., 0], -torch.inf)
        return output, lse.transpose(1, 2)


class CoreAttention(nn.Module):
    """The attention of the small transformer, by a core."""

    def __init__(self, shape):
        super().__init__()
        self.head_dim = shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.heads * self.head_dim)
        self.k = nn.Linear(shape.width, shape.kv_heads * self.head_dim)
        self.v = nn.Linear(shape.width, shape.kv_heads * self.head_dim)
        self.out = nn.Linear(shape.heads * self.head_dim, shape.width)
        self.core = Core()

    def forward(self, x, positions, mask):
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q, self.k, self.v))
        q, k = (t * torch.cos(positions * 0.3)[..., None, None].to(t.dtype) for t in (q, k))
        return self.out(self.core(q, k, v, mask, 0.4).flatten(-2))


class CoreBlock(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(shape.width, eps=1e-6), CoreAttention(shape)
        self.feed_forward = nn.Sequential(nn.Linear(shape.width, 48), nn.SiLU(), nn.Linear(48, shape.width))

    def forward(self, x, positions, mask):
        x = x + self.attention(self.norm(x), positions, mask)
        return x + self.feed_forward(x)


class CoreTransformer(nn.Module):
    def __init__(self, shape, window=None, chunk=None):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(CoreBlock(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, shape.vocab)
        self.window, self.chunk = window, chunk

    def forward(self, tokens, positions, documents=None):
        x = self.embedding(tokens)
        mask = Mask(positions, positions, documents, documents, self.window, self.chunk)
        realised = self.layers[0].attention.core.realise(mask)
        for layer in self.layers:
            x = layer(x, positions, realised)
        return self.head(x)


ROLES = {
    "embedding": "embedding",
    "layers.*": "block",
    "layers.*.attention": "region",
    "layers.*.attention.q": ("colwise", {"num_heads": 4}),
    "layers.*.attention.k": "colwise",
    "layers.*.attention.v": "colwise",
    "layers.*.attention.out": "rowwise",
    "layers.*.attention.core": "attention",
    "layers.*.feed_forward": "region",
    "layers.*.feed_forward.0": "colwise",
    "layers.*.feed_forward.2": "rowwise",
    "head": "head",
}


@dataclass(frozen=True)
class Case:
    method: str
    num_ranks: int = 2
    degrees: tuple = ()
    packed: bool = True
    window: int | None = None
    chunk: int | None = None
    kv_heads: int = 2
    recomputation: object = None
    backend: str | None = None

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in dataclasses.asdict(self).items() if value not in (None, ())]
        return " ".join(word.replace("parallel_", "") for word in words)


def cases() -> list:
    tensor_2, replicate_2 = (("tensor_parallel_degree", 2),), (("data_parallel_replicate_degree", 2),)
    found = []
    for method in METHODS:
        case = Case(method)
        found += [case, replace(case, packed=False), replace(case, window=5), replace(case, packed=False, chunk=7)]
        found += [replace(case, recomputation=kind.Config()) for kind in (FullRecompute, SelectiveRecompute)]
        found += [replace(case, kv_heads=1, recomputation=EveryNthBlock.Config()), replace(case, backend="aot_eager")]
        found += [replace(case, kv_heads=4, degrees=(("context_parallel_load_balance", False),))]
        case = replace(case, num_ranks=4, kv_heads=4 if method == "ring" else 2)
        found += [replace(case, degrees=tensor_2), replace(case, degrees=replicate_2), case]
        found += [replace(case, degrees=(("context_parallel_degree", 4),), window=9)]
        found += [replace(case, num_ranks=8, degrees=tensor_2)]
        found += [replace(case, num_ranks=8, degrees=(*tensor_2, *replicate_2))]
    return found


replace = dataclasses.replace
CASES = cases()


def make_model(small, case: Case, dtype=torch.float64) -> CoreTransformer:
    torch.manual_seed(0)
    shape = small.Shape(kv_heads=case.kv_heads)
    return CoreTransformer(shape, case.window, case.chunk).to(dtype)


def make_batch(small, packed: bool, length: int = LENGTH):
    batch = small.make_batch(length=length)
    if packed:
        lengths = [[length], [5, length - 5], [11, 1, length - 12], [length - 3, 3]] * 2
        batch.inputs["positions"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        numbers = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
        batch.inputs["documents"] = torch.stack(numbers)
        batch.sequence_dims["documents"] = 1
    return batch


def make_dims(case: Case) -> ParallelDims:
    degrees = {"context_parallel_degree": 2, "context_parallel_method": case.method, **dict(case.degrees)}
    return ParallelDims.Config(**degrees).build(world_size=case.num_ranks, device_type="cpu")


def put(small, case: Case, dtype=torch.float64, **options):
    compiler = Compile.Config(backend=case.backend) if case.backend else None
    model = make_model(small, case, dtype)
    recomputation = case.recomputation
    return parallelize(model, ROLES, make_dims(case), activation_checkpoint=recomputation, compile=compiler, **options)


def micro_batches(small, batch, dims) -> list:
    parts = small.micro_batches(batch, dims, 2)
    return [dataclasses.replace(part, sequence_dims=batch.sequence_dims) for part in parts]


def judged(small, case: Case) -> str:
    """ "", or what is wrong on this rank."""
    batch = make_batch(small, case.packed)
    expected_loss, expected, count = small.plain_step(make_model(small, case), batch)
    parallel = put(small, case)
    batches = micro_batches(small, batch, parallel.dims)
    try:
        loss = parallel.forward_backward(batches, small.chunked_loss, count)
        check_same_gradients(full_gradients(parallel.model), expected)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        evaluated, counted = parallel.evaluate(batches, small.chunked_loss)
        torch.testing.assert_close(evaluated, expected_loss, rtol=1e-12, atol=0)
        assert int(counted) == count
    except Exception:
        return traceback.format_exc()
    return ""


@pytest.fixture(scope="module")
def outcomes(run_ranks, small):
    """`outcomes(num_ranks)`: what each rank says of each case; ranks are started once for each number of them."""
    said: dict[int, dict[Case, set[str]]] = {}

    def of(num_ranks: int) -> dict[Case, set[str]]:
        if num_ranks not in said:
            mine = [case for case in CASES if case.num_ranks == num_ranks]
            results = run_ranks(num_ranks, lambda: [judged(small, case) for case in mine])
            said[num_ranks] = dict(zip(mine, map(set, zip(*results, strict=True)), strict=True))
        return said[num_ranks]

    return of


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.full] * (case.num_ranks == 8)) for case in CASES]
)
def test_gradients_and_losses_equal_the_plain_model(outcomes, case):
    assert outcomes(case.num_ranks)[case] == {""}
