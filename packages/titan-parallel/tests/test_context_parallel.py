"""Context parallelism: the gradients of the plain model, with every method, mask and additional kind of parallelism.

B batch, T queries, S keys, H heads, K features of a head.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import (
    Compile,
    FullActivationCheckpoint,
    MixedPrecision,
    ParallelDims,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
    parallelize,
)
from titan_parallel.context_parallel import all_gather as context_gather
from titan_parallel.context_parallel import ring as context_ring
from titan_parallel.context_parallel import sequence_sharding as context_shards
from titan_parallel.context_parallel import shared_sequences
from titan_parallel.context_parallel import ulysses as context_ulysses
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn

METHODS = ["gather", "ulysses", "ring"]
LENGTH = 24
RECOMPUTATIONS = {
    None: None,
    "full": FullActivationCheckpoint.Config(),
    "selective": SelectiveActivationCheckpoint.Config(),
    "every second": PeriodicActivationCheckpoint.Config(),
}


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
    """Attention with materialized scores."""

    def build_mask(self, mask):
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
    """The attention of the small transformer, with a core."""

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
        built_mask = self.layers[0].attention.core.build_mask(mask)
        for layer in self.layers:
            x = layer(x, positions, built_mask)
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
    recomputation: str | None = None
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
        found += [replace(case, recomputation=kind) for kind in ("full", "selective")]
        found += [replace(case, kv_heads=1, recomputation="every second"), replace(case, backend="aot_eager")]
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
    recomputation = RECOMPUTATIONS[case.recomputation]
    return parallelize(model, ROLES, make_dims(case), activation_checkpoint=recomputation, compile=compiler, **options)


def micro_batches(small, batch, dims) -> list:
    parts = small.micro_batches(batch, dims, 2)
    return [dataclasses.replace(part, sequence_dims=batch.sequence_dims) for part in parts]


def judged(small, case: Case) -> str:
    """Return "", or the traceback of this rank."""
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
    """`outcomes(case)`: the results of the ranks, which are started once for all cases with the same size and mark."""
    said: dict[Case, set[str]] = {}

    def of(case: Case) -> set[str]:
        if case not in said:
            alike = [c for c in CASES if c.num_ranks == case.num_ranks and only_in_full(c) == only_in_full(case)]
            results = run_ranks(case.num_ranks, lambda: [judged(small, case) for case in alike])
            said.update(zip(alike, map(set, zip(*results, strict=True)), strict=True))
        return said[case]

    return of


def only_in_full(case: Case) -> bool:
    return case.num_ranks == 8 or (case.backend is not None and case.method != "gather")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.full] * only_in_full(case)) for case in CASES]
)
def test_gradients_and_losses_equal_the_plain_model(outcomes, case):
    assert outcomes(case) == {""}


def shift_positions(patch):
    local = shared_sequences.SharedSequences.local

    def shifted(self, tensors, sequence_dims):
        found = local(self, tensors, sequence_dims)
        if "positions" in found:
            found["positions"] = found["positions"] * (1 + self.shards.axis.rank)
        return found

    patch.setattr(shared_sequences.SharedSequences, "local", shifted)


def open_documents_across_ranks(patch):
    def opened(mask, names, shards):
        return dataclasses.replace(gather_fields(mask, names, shards), query_documents=None, key_documents=None)

    gather_fields = context_gather.gather_fields
    for module in (context_gather, context_ulysses, context_ring):
        patch.setattr(module, "gather_fields", opened)


def drop_the_gradient_sum_of_keys(patch):
    def own(ctx, grad):
        return ctx.shards.by_rank(grad)[ctx.shards.axis.rank], None

    patch.setattr(context_shards._Whole, "backward", staticmethod(own))


def forget_the_balance(patch):
    patch.setattr(context_shards.ContextShards, "in_order", lambda self, x: x.movedim(0, 1).flatten(1, 2))


def skip_a_step_of_the_ring(patch):
    build_mask = context_ring.Ring.build_mask
    patch.setattr(context_ring.Ring, "build_mask", lambda *args: [build_mask(*args)[0], []])


def keep_gradients_from_going_home(patch):
    patch.setattr(context_ring.PendingReceive, "wait", lambda self: [work.wait() for work in self.works] and self.sent)


def take_the_heads_of_another_rank(patch):
    exchange = context_shards.ContextShards.exchange
    patch.setattr(context_shards.ContextShards, "exchange", lambda self, x: exchange(self, x).flip(0))


def forget_how_much_a_block_counts(patch):
    patch.setattr(context_ring, "_share", lambda lse_of_part, lse: lse_of_part.exp())


SABOTAGES = [
    *((method, sabotage) for method in METHODS for sabotage in (shift_positions, open_documents_across_ranks)),
    ("gather", drop_the_gradient_sum_of_keys),
    ("gather", forget_the_balance),
    ("ring", forget_the_balance),
    ("ring", skip_a_step_of_the_ring),
    ("ring", keep_gradients_from_going_home),
    ("ring", forget_how_much_a_block_counts),
    ("ulysses", take_the_heads_of_another_rank),
]


def test_broken_context_parallelism_is_detected_on_every_rank(run_ranks, small):
    def on_rank():
        said = []
        for method, sabotage in SABOTAGES:
            with pytest.MonkeyPatch.context() as patch:
                sabotage(patch)
                said.append(judged(small, Case(method)))
        return said

    for said in run_ranks(2, on_rank):
        for (method, sabotage), words in zip(SABOTAGES, said, strict=True):
            assert "AssertionError: The gradient of" in words, (method, sabotage.__name__, words)


def test_load_balance_gives_every_rank_the_same_work(run_ranks, small):
    """The number of scores that a block-sparse core (gather) or the tiles (ring) compute, for one layer and head."""

    def scores(method: str, balanced: bool) -> int:
        made = []
        degrees = (("context_parallel_degree", 4), ("context_parallel_load_balance", balanced))
        with_lse = Core.with_lse

        def counted(self, q, k, v, mask, scale):
            made.append(int(mask[0].sum()) if method == "gather" else q.size(1) * k.size(1))
            return with_lse(self, q, k, v, mask, scale)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Core, "with_lse", counted)
            parallel = put(small, Case(method, 4, degrees, packed=False))
            parallel.evaluate([make_batch(small, packed=False, length=64)], small.chunked_loss)
        return sum(made) // 2  # layers

    kinds = [("gather", True), ("gather", False), ("ring", True), ("ring", False)]
    by_rank = run_ranks(4, lambda: [scores(*kind) for kind in kinds])
    gather, gather_unbalanced, ring, ring_unbalanced = zip(*by_rank, strict=True)
    assert gather == (64 * 65 // 2 // 4,) * 4
    assert gather_unbalanced == (136, 392, 648, 904)
    assert ring == (9 * 8 * 8,) * 4  # of 64 tiles of 8 x 8, 36 are visible: 9 for each rank
    assert ring_unbalanced == (256, 512, 768, 1024)


def test_number_of_collectives_per_layer_and_direction(run_ranks, small):
    def count(method: str) -> Counter:
        counts = Counter()

        def counted(owner, name):
            function = getattr(owner, name)
            return lambda *args: counts.update([name]) or function(*args)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_gather", "reduce_scatter", "all_to_all"):
                patch.setattr(context_shards, name, counted(context_shards, name))
            patch.setattr(context_ring.Neighbors, "send_to_next", counted(context_ring.Neighbors, "send_to_next"))
            parallel = put(small, Case(method))
            parallel.forward_backward([make_batch(small, packed=True)], small.chunked_loss, 1)
        return counts

    for gather, ulysses, ring in run_ranks(2, lambda: [count(method) for method in METHODS]):
        # for two layers, and one gather of positions and documents
        assert gather == {"all_gather": 2 + 1, "reduce_scatter": 2}
        assert ulysses == {"all_to_all": 2 * (2 + 2), "all_gather": 1}
        assert ring == {"send_to_next": 2 * (1 + 1 + 2), "all_gather": 1}


def test_called_directly_a_model_sees_whole_sequences(run_ranks, small):
    batch = make_batch(small, packed=True)
    expected = make_model(small, Case("gather"))(**batch.inputs).detach()

    def logits(method):
        parallel = put(small, Case(method))
        parallel.evaluate([batch], small.chunked_loss)
        with torch.no_grad():
            return parallel.model(**batch.inputs)

    for of_rank in run_ranks(2, lambda: [logits(method) for method in METHODS]):
        for got in of_rank:
            torch.testing.assert_close(got, expected)


def test_mixed_precision_is_close(run_ranks, small):
    batch = make_batch(small, packed=True)
    reference = small.refer(make_model(small, Case("gather"), torch.float32), batch, torch.bfloat16)

    def on_rank():
        for method in METHODS:
            parallel = put(small, Case(method), torch.float32, mixed_precision=MixedPrecision.Config())
            parallel.forward_backward([batch], small.chunked_loss, reference.count)
            reference.check_gradients(full_gradients(parallel.model))

    run_ranks(2, on_rank)


def errors(small, batch=None, roles=None, model=None, method="gather", **degrees) -> str:
    try:
        case = Case(method, 2 * degrees.get("tensor_parallel_degree", 1), tuple(degrees.items()))
        parallel = parallelize(model or make_model(small, case), roles or ROLES, make_dims(case))
        parallel.forward_backward([batch or make_batch(small, packed=True)], small.chunked_loss, 1)
    except (ConfigError, ValueError) as error:
        return str(error)
    return ""


def test_invalid_batches_and_models_raise_on_every_rank(run_ranks, small):
    def on_rank():
        unnamed = make_batch(small, packed=True)
        unnamed.sequence_dims.pop("labels")
        no_lse = make_model(small, Case("ring"))
        for layer in no_lse.layers:
            layer.attention.core.with_lse = None
        without = {name: role for name, role in ROLES.items() if role != "attention"}
        three_heads = CoreTransformer(small.Shape(width=24, heads=3, kv_heads=1)).double()
        three_roles = ROLES | {"layers.*.attention.q": "colwise"}
        return [
            errors(small, make_batch(small, packed=False, length=26)),
            errors(small, make_batch(small, packed=False, length=25), context_parallel_load_balance=False),
            errors(small, unnamed),
            errors(small, roles=without),
            errors(small, model=no_lse, method="ring"),
            errors(small, model=three_heads, roles=three_roles, method="ulysses"),
        ]

    for said in run_ranks(2, on_rank):
        balanced, plain, unnamed, without, no_lse, heads = said
        assert "must be a multiple of 4 under context_parallel_degree 2 " in balanced and "got 26." in balanced
        assert "must be a multiple of 2 under context_parallel_degree 2 " in plain and "got 25." in plain
        assert "sequence_dims of a batch must name" in unnamed and "targets" in unnamed and "labels" in unnamed
        assert "must be 1 without a module of the role attention" in without
        assert "under context_parallel_method ring must have with_lse, got layers.0.attention.core, a Core" in no_lse
        assert "must divide the number of heads of a tensor-parallel rank (3)" in heads and "Use 1 or 3, or" in heads


def test_a_sequence_is_split_over_context_and_then_over_tensor_ranks(run_ranks, small):
    for said in run_ranks(
        4, lambda: errors(small, make_batch(small, packed=False, length=18), tensor_parallel_degree=2)
    ):
        assert "must be a multiple of 4 under context_parallel_degree 2 " in said and "got 18." in said
