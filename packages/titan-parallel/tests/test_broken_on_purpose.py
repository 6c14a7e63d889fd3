"""`check_parallel` finds errors: each test breaks the parallelism, or a table of roles, and reads the report."""

from __future__ import annotations

import pytest
import torch
from titan_parallel import check_parallel, parallel_model
from titan_parallel.check import meshes
from titan_parallel.check.factor import explain, sizes_of
from titan_parallel.check.tolerances import compare, norm
from titan_parallel.mesh import collectives
from titan_parallel.step import grad_norm as gradient_norm
from titan_parallel.step import gradient_accumulation as accumulation
from titan_parallel.tensor_parallel import apply as tensor_parallel
from titan_parallel.tensor_parallel import partial_gradients
from titan_parallel.testing import check_same_gradients
from torch import nn
from torch.distributed.fsdp import FSDPModule


def first_finding(small, mesh, steps=1, **options):
    """Return the first finding of the check of the small transformer on a mesh."""
    options = {"roles": small.ROLES, "steps": steps, "num_microbatches": 3, **options}
    report = check_parallel(small.make_model, meshes(mesh), **options)
    assert not report.ok
    assert report.meshes[mesh].failure is None, report
    assert report.meshes[mesh].findings[0].name in str(report)
    return report.meshes[mesh].findings[0]


def drop_partial_gradient_sum(patch):
    patch.setattr(partial_gradients.PartialGradients, "_sum", lambda self, model: None)


def sum_full_gradients_too(patch):
    def all_that_are_not_sharded(self, split):
        return [name for name, parameter in self._model.named_parameters() if parameter not in split]

    patch.setattr(tensor_parallel.TensorParallel, "_find_partial", all_that_are_not_sharded)


def drop_sum_on_exit(patch):
    patch.setattr(collectives.Axis, "sum", lambda self, x, of_gradients=False: x)


def drop_gradient_sum_on_entry(patch):
    patch.setattr(collectives.Axis, "copy", lambda self, x: x)


def take_own_tokens_without_sum(patch):
    patch.setattr(collectives.Axis, "sum_scatter_sequence", lambda self, x: x.chunk(self.size, -2)[self.rank])


def add_biases_on_every_rank(patch):
    patch.setattr(tensor_parallel.TensorParallel, "_find_slices", lambda self: {})


def average_over_data_ranks(patch):
    patch.setattr(parallel_model.ParallelModel, "_num_averaged", 1)


def never_synchronize(patch):
    set_sync = FSDPModule.set_requires_gradient_sync
    patch.setattr(FSDPModule, "set_requires_gradient_sync", lambda self, *_, **__: set_sync(self, False))


def divide_by_local_count(patch):
    right = accumulation.GradientAccumulation.forward_backward

    def wrong(self, batches, loss, denominator):
        return right(self, batches, loss, sum(int((batch.targets["labels"] != -100).sum()) for batch in batches))

    patch.setattr(accumulation.GradientAccumulation, "forward_backward", wrong)


def skip_a_micro_batch(patch):
    right = accumulation.GradientAccumulation.forward_backward
    patch.setattr(
        accumulation.GradientAccumulation,
        "forward_backward",
        lambda self, batches, *rest: right(self, batches[1:], *rest),
    )


def do_not_sum_losses(patch):
    patch.setattr(parallel_model.ParallelModel, "_sum_over_mesh", lambda self, totals: totals)


def count_replicas_in_the_norm(patch):
    patch.setattr(gradient_norm, "_counts_here", lambda gradient: True)


def do_not_clip(patch):
    patch.setattr(parallel_model, "scale_gradients_", lambda *_: None)


def full(*cell):
    return pytest.param(*cell, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("mesh", "sabotage", "kind", "name", "words"),
    [
        ("tp2", sum_full_gradients_too, "gradients", "layers.0.attention_norm.weight", "x2.0: tp_size"),
        ("tp2", drop_partial_gradient_sum, "gradients", "layers.0.attention.out.bias", "x0: the value is zero"),
        ("tp2", drop_sum_on_exit, "gradients", "embedding.weight", "no simple factor"),
        full("tp2", drop_gradient_sum_on_entry, "gradients", "embedding.weight", "no simple factor"),
        ("tp2_sp", drop_partial_gradient_sum, "gradients", "layers.0.attention.out.bias", "x0: the value is zero"),
        ("tp2_sp", take_own_tokens_without_sum, "gradients", "embedding.weight", "no simple factor"),
        full("tp2_sp", add_biases_on_every_rank, "gradients", "embedding.weight", "no simple factor"),
        ("fsdp2", average_over_data_ranks, "gradients", "embedding.weight", "x0.5: 1 / dp_size"),
        ("fsdp2", never_synchronize, "gradients", "embedding.weight", "no gradient on the mesh"),
        full("fsdp2", divide_by_local_count, "gradients", "embedding.weight", "no simple factor"),
        full("fsdp2", skip_a_micro_batch, "gradients", "embedding.weight", "no simple factor"),
        ("fsdp2", do_not_sum_losses, "losses", "loss of step 1", "x"),
        ("ddp2", count_replicas_in_the_norm, "norms", "gradient norm of step 1", "x1.414: sqrt(dp_size)"),
        full("fsdp2", do_not_clip, "losses", "loss of the evaluation", "x"),
    ],
)
def test_broken_parallelism_is_found_and_the_parameter_is_named(small, monkeypatch, mesh, sabotage, kind, name, words):
    sabotage(monkeypatch)
    finding = first_finding(small, mesh)
    assert (finding.kind, finding.name) == (kind, name)
    assert finding.ranks == ((1,) if "bias" in name else (0, 1))  # a bias is added by rank 0
    assert words in finding.words
    assert finding.ratio > 1000


@pytest.mark.parametrize(
    ("mesh", "sabotage", "name", "words"),
    [
        ("tp2_sp", drop_partial_gradient_sum, "layers.0.attention.out.bias", "x0: the value is zero"),
        ("fsdp2", average_over_data_ranks, "embedding.weight", "x0.5: 1 / dp_size"),
    ],
)
def test_broken_parallelism_is_found_in_fp32(small, monkeypatch, mesh, sabotage, name, words):
    sabotage(monkeypatch)
    finding = first_finding(small, mesh, dtype=torch.float32)
    assert (finding.kind, finding.name) == ("gradients", name)
    assert words in finding.words
    assert finding.ratio > 100


def test_only_the_wrong_rank_is_named(small, monkeypatch):
    right = parallel_model.ParallelModel.clip_grad_norm_
    wrong_on_1 = lambda self, max_norm: right(self, max_norm) * (1 + self.dims.dp_rank)  # noqa: E731
    monkeypatch.setattr(parallel_model.ParallelModel, "clip_grad_norm_", wrong_on_1)
    finding = first_finding(small, "fsdp2")
    assert finding.name == "gradient norm of step 1" and finding.ranks == (1,)
    assert "x2.0: dp_size" in finding.words


class Layer(nn.Module):
    """A third-party layer: the bias of its region does not belong to a projection."""

    def __init__(self, has_region_bias):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=not has_region_bias)
        self.bias = nn.Parameter(torch.zeros(16)) if has_region_bias else None

    def forward(self, x):
        x = self.down(torch.tanh(self.up(x)))
        return x if self.bias is None else x + self.bias


class Model(nn.Module):
    def __init__(self, has_region_bias):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 20)
        self.layers = nn.ModuleList(Layer(has_region_bias) for _ in range(2))

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(x)


TABLE = {
    "words": "embedding",
    "layers.*": "region",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
    "head": "head",
}


def test_a_wrong_role_is_found_and_the_module_is_named():
    swapped = {**TABLE, "layers.*.up": "rowwise", "layers.*.down": "colwise"}
    in_no_region = {name: role for name, role in TABLE.items() if name != "layers.*"}
    assert check_parallel(lambda: Model(False), meshes("fsdp2", "tp2"), roles=TABLE).ok

    report = check_parallel(lambda: Model(False), meshes("fsdp2", "tp2"), roles=swapped)
    assert report.meshes["fsdp2"].ok and "(in layers.0.up)" in report.meshes["tp2"].failure
    with pytest.raises(ValueError, match="must be used inside a region"):
        check_parallel(lambda: Model(False), meshes("tp2"), roles=in_no_region)

    report = check_parallel(lambda: Model(True), meshes("fsdp2", "tp2"), roles=TABLE)
    assert report.meshes["fsdp2"].ok
    differing = [finding.name for finding in report.meshes["tp2"].findings if finding.kind == "gradients"]
    assert differing[0] == "words.weight" and "layers.0.bias" in differing


def test_factors_are_explained_by_sizes_of_the_mesh():
    sizes = sizes_of(meshes("ddp3_fsdp5_tp2")["ddp3_fsdp5_tp2"], 30, 7)
    expected = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def explained(got) -> str:
        return explain(compare(got, expected, norm(expected)), sizes)

    assert explained(2 * expected) == "x2.0: tp_size"
    assert explained(expected / 2) == "x0.5: 1 / tp_size"
    assert explained(-expected) == "x-1.0: the sign is flipped"
    assert explained(0 * expected) == "x0: the value is zero"
    assert explained(15 * expected) == "x15.0: dp_replicate_size x dp_shard_size"
    assert explained(-7 * expected) == "x-7.0: minus num_microbatches"
    assert explained(11 * expected) == "x11.0: matches no size of this mesh"
    assert explained(expected.flip(0)) == "no simple factor"
    assert explained(expected * 5**0.5) == "x2.236: sqrt(dp_shard_size)"


def test_the_message_names_the_parameter_and_the_factor():
    expected = {"a": torch.ones(3), "b": torch.ones(3), "zero": torch.zeros(3)}
    expected = {name: tensor.double() for name, tensor in expected.items()}
    check_same_gradients({**expected, "zero": torch.full((3,), 1e-13, dtype=torch.float64)}, expected)
    with pytest.raises(AssertionError, match=r"gradient of b .*x2,"):
        check_same_gradients({**expected, "b": 2 * expected["b"]}, expected)
    with pytest.raises(AssertionError, match=r"gradient of a "):
        check_same_gradients({**expected, "a": float("nan") * expected["a"]}, expected)
    with pytest.raises(AssertionError, match="Only one side has b"):
        check_same_gradients({"a": expected["a"], "zero": expected["zero"]}, expected)


def test_in_fp32_the_tolerance_is_ten_times_the_rounding_of_the_single_process():
    expected = {"a": torch.ones(4, dtype=torch.float64), "zero": torch.zeros(4, dtype=torch.float64)}
    plain = [
        {"a": torch.ones(4), "zero": torch.full((4,), 3e-8)},
        {"a": torch.ones(4) + 1e-5, "zero": torch.full((4,), -1e-8)},
    ]
    check_same_gradients({"a": torch.ones(4) + 9e-5, "zero": torch.full((4,), 2.9e-7)}, expected, plain)
    for name, value in (("a", 1.2e-4), ("zero", 3.1e-7)):
        with pytest.raises(AssertionError, match=f"gradient of {name} .* times the tolerance"):
            check_same_gradients({**plain[0], name: expected[name].float() + value}, expected, plain)
    exact = [{name: tensor.float() for name, tensor in expected.items()}]
    check_same_gradients({**exact[0], "a": torch.ones(4) + 5e-7}, expected, exact)  # the unit roundoff is allowed
    with pytest.raises(AssertionError, match="gradient of a "):
        check_same_gradients({**exact[0], "a": torch.ones(4) + 1e-6}, expected, exact)
    with pytest.raises(ValueError, match=r"expected must be in float64, got torch.float32 for a\."):
        check_same_gradients(plain[0], plain[0])
