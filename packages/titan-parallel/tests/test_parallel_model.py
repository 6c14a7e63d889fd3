"""What a parallel model promises beside equal gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from titan_parallel import FullActivationCheckpoint, MixedPrecision, parallelize
from titan_parallel.step.grad_norm import gradient_norm, scale_gradients_
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

MESHES = {1: ["one"], 2: ["fsdp2", "ddp2", "tp2", "tp2_both"], 4: ["hsdp2x2", "fsdp2_tp2"]}


def on_every_mesh(run_ranks, function):
    """`function(mesh)` on each mesh; the results of all ranks of all meshes."""
    results = []
    for num_ranks, meshes in MESHES.items():
        for of_rank in run_ranks(num_ranks, lambda meshes=meshes: [function(mesh) for mesh in meshes]):
            results += of_rank
    return results


def test_evaluate_sums_over_the_mesh_and_leaves_no_trace(run_ranks, small):
    model = small.make_model()
    batch = small.make_batch()
    expected_loss, _, count = small.plain_step(model, batch)

    def evaluate(mesh):
        model = small.make_model()
        modes = []
        model.norm.register_forward_hook(lambda *_: modes.append(model.training))
        parallel = small.put_on(mesh, model)
        batches = small.micro_batches(batch, parallel.dims, 2)
        loss, counted = parallel.evaluate(batches, small.chunked_loss)
        assert (counted.dtype, int(counted)) == (torch.int64, count)
        assert modes == [False, False] and model.training
        assert all(p.grad is None for p in model.parameters())
        return float(loss)

    for loss in on_every_mesh(run_ranks, evaluate):
        assert loss == pytest.approx(float(expected_loss), rel=1e-12)


def test_a_step_that_raises_leaves_nothing_behind(on_one_rank, small):
    """No hook, which would see the gradients of the next step twice, and no eval mode."""

    def check():
        parallel, seen = small.put_on("one", small.make_model()), []
        parallel.set_gradient_hook(lambda tensor: seen.append(tensor.numel()))
        for step in (parallel.evaluate, lambda *args: parallel.forward_backward(*args, 1)):
            with pytest.raises(ArithmeticError, match="too large"):
                step([small.make_batch()], too_large)
        assert parallel.model.training
        parallel.forward_backward([small.make_batch()], small.chunked_loss, 1)
        return sum(seen)

    assert on_one_rank(check) == sum(p.numel() for p in small.make_model().parameters())


def test_a_step_that_raises_leaves_a_loop_of_ones_own_its_sums(run_ranks, small):
    """The first of two micro-batches sums nothing over replicas; what comes after it does."""

    def check(raises):
        parallel, batch = small.put_on("hsdp2x2", small.make_model()), small.make_batch(rows=4)
        if raises:
            with pytest.raises(ArithmeticError, match="too large"):
                parallel.forward_backward([batch, batch], too_large, 1)
        rank = torch.distributed.get_rank()
        mine = {name: tensor[rank : rank + 1] for name, tensor in batch.inputs.items()}
        parallel.model(**mine).square().sum().backward()
        return full_gradients(parallel.model)

    def both():
        check_same_gradients(check(raises=True), check(raises=False))
        return True

    assert run_ranks(4, both) == [True] * 4


def too_large(head, hidden, targets):
    raise ArithmeticError("too large")


def test_evaluate_sees_weights_changed_since_the_last_one(run_ranks, small):
    def losses(mesh):
        parallel = small.put_on(mesh, small.make_model())
        batches = small.micro_batches(small.make_batch(), parallel.dims)
        first, _ = parallel.evaluate(batches, small.chunked_loss)
        with torch.no_grad():
            for parameter in parallel.model.parameters():
                parameter.mul_(0.5)
        second, _ = parallel.evaluate(batches, small.chunked_loss)
        plain = small.make_model()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(0.5)
        return float(first), float(second), float(small.plain_step(plain, small.make_batch())[0])

    for first, second, expected in on_every_mesh(run_ranks, losses):
        assert second == pytest.approx(expected, rel=1e-12)
        assert second != first


def test_a_direct_call_returns_the_logits_of_the_plain_model(run_ranks, small):
    batch = small.make_batch(vocab=61)
    expected = small.make_model(small.Shape(vocab=61))(**batch.inputs).detach()

    def logits(mesh):
        model = small.make_model(small.Shape(vocab=61))
        parallel = small.put_on(mesh, model)
        parallel.evaluate(small.micro_batches(batch, parallel.dims), small.chunked_loss)
        with torch.no_grad():
            return model(**batch.inputs)

    for got in on_every_mesh(run_ranks, logits):
        torch.testing.assert_close(got, expected)


def test_the_gradient_hook_sees_each_gradient_once_it_is_summed(run_ranks, small):
    batch = small.make_batch()
    _, expected, count = small.plain_step(small.make_model(), batch)
    num_numbers = sum(gradient.numel() for gradient in expected.values())

    def step(mesh):
        parallel = small.put_on(mesh, small.make_model())
        seen = []

        def triple(tensor):
            seen.append(tensor.numel())
            tensor.mul_(3)

        parallel.set_gradient_hook(triple)
        parallel.forward_backward(small.micro_batches(batch, parallel.dims, 2), small.chunked_loss, count)
        check_same_gradients(full_gradients(parallel.model), {name: 3 * g for name, g in expected.items()})
        dims = parallel.dims
        always = (
            dims.config.fsdp_reduce_gradients == "always" and dims.dp_shard_size > 1 and dims.dp_replicate_size == 1
        )
        return sum(seen) * dims.dp_shard_size * dims.tp_size / (2 if always else 1)

    for seen in on_every_mesh(run_ranks, step):
        assert num_numbers <= seen < 1.5 * num_numbers  # padding, and on the tensor axis what is held whole


def test_the_gradient_hook_works_for_one_rank_in_mixed_precision(on_one_rank, small):
    def check():
        seen = []
        parallel = small.put_on("one", small.make_model(dtype=torch.float32), mixed_precision=MixedPrecision.Config())
        parallel.set_gradient_hook(lambda tensor: seen.append(tensor.dtype))
        parallel.forward_backward([small.make_batch()], small.chunked_loss, 1)
        assert set(seen) == {torch.float32}

    on_one_rank(check)


def test_a_model_on_meta_is_given_memory_after_it_is_split(run_ranks, small):
    batch = small.make_batch()
    _, expected, count = small.plain_step(small.make_model(small.Shape(tied=True)), batch)

    def step(mesh):
        with torch.device("meta"):
            model = small.Transformer(small.Shape(tied=True)).double()
        parallel = small.put_on(mesh, model, activation_checkpoint=FullActivationCheckpoint.Config())
        parallel.to_empty("cpu")
        full = small.make_model(small.Shape(tied=True)).state_dict()
        set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
        assert all(p.is_meta is False for p in model.parameters())
        parallel.forward_backward(small.micro_batches(batch, parallel.dims), small.chunked_loss, count)
        check_same_gradients(full_gradients(model), expected)
        return True

    assert all(on_every_mesh(run_ranks, step))


def test_one_rank_in_the_stored_dtype_runs_the_plain_model(on_one_rank, small):
    def check():
        model = small.make_model(dtype=torch.float32)
        kinds = [type(module) for module in model.modules()]
        small.put_on("one", model, mixed_precision=MixedPrecision.Config(param="float32"))
        assert [type(module) for module in model.modules()] == kinds
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())

    on_one_rank(check)


def test_mixed_precision_computes_in_one_dtype_and_stores_in_another(run_ranks, small):
    batch = small.make_batch()
    reference = small.refer(small.make_model(dtype=torch.float32), batch, torch.bfloat16)

    def step(mesh):
        model = small.make_model(dtype=torch.float32)
        dtypes = set()
        model.layers[0].feed_forward.down.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
        parallel = small.put_on(mesh, model, mixed_precision=MixedPrecision.Config(param="bfloat16"))
        parallel.forward_backward(small.micro_batches(batch, parallel.dims, 2), small.chunked_loss, reference.count)
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        reference.check_gradients(full_gradients(model))
        with pytest.raises(AssertionError):
            check_same_gradients(full_gradients(model), reference.gradients)
        return dtypes

    assert all(dtypes == {torch.bfloat16} for dtypes in on_every_mesh(run_ranks, step))


@pytest.mark.parametrize("max_norm", [None, float("inf")])
def test_without_a_bound_the_norm_is_only_measured(on_one_rank, small, max_norm):
    def check():
        parallel = small.put_on("one", small.make_model())
        parallel.forward_backward([small.make_batch()], small.chunked_loss, 1)
        before = copy.deepcopy(full_gradients(parallel.model))
        norm = parallel.clip_grad_norm_(max_norm)
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in before.values()]).norm()), rel=1e-12)
        after = full_gradients(parallel.model)
        assert all(torch.equal(after[name], gradient) for name, gradient in before.items())

    on_one_rank(check)


def test_a_norm_in_fp32_is_exact_to_1e_8(on_one_rank):
    def check():
        model = nn.Linear(300, 5000)
        parallel = parallelize(model, {}, _dims())
        model.weight.grad, model.bias.grad = torch.rand_like(model.weight), torch.rand_like(model.bias)
        exact = torch.cat([model.weight.grad.double().flatten(), model.bias.grad.double()]).norm()
        assert parallel.clip_grad_norm_(None) == pytest.approx(float(exact), rel=1e-8)

    on_one_rank(check)


def test_an_output_that_is_not_the_heads_is_refused(on_one_rank, small):
    def check():
        class Doubled(small.Transformer):
            def forward(self, tokens, positions):
                return super().forward(tokens, positions) * 2

        parallel = parallelize(Doubled(small.Shape()), small.ROLES, _dims())
        with pytest.raises(ValueError, match="must be what its head returned"):
            parallel.forward_backward([small.make_batch()], small.chunked_loss, 1)

    on_one_rank(check)


def test_no_batches_are_refused(on_one_rank, small):
    def check():
        parallel = small.put_on("one", small.make_model())
        with pytest.raises(ValueError, match="at least one batch on every data rank, got none"):
            parallel.forward_backward([], small.chunked_loss, 1)

    on_one_rank(check)


def test_a_sequence_that_does_not_divide_is_refused_on_every_rank(run_ranks, small):
    def error():
        parallel = small.put_on("tp2_both", small.make_model())
        message = r"must be a multiple of tensor_parallel_degree \(2\) .*, got 13"
        with pytest.raises(ValueError, match=message) as caught:
            parallel.forward_backward([small.make_batch(length=13)], small.chunked_loss, 1)
        with pytest.raises(ValueError, match=r"sequence length must be a multiple of .*, got 13"):
            parallel.model(**small.make_batch(length=13).inputs)
        return str(caught.value)

    for said in run_ranks(2, error):
        assert "multiple of tensor_parallel_degree (2)" in said


def test_ids_beyond_the_vocabulary_fail_on_every_rank(run_ranks, small):
    def errors():
        parallel = small.put_on("tp2_loss", small.make_model())
        batch = small.make_batch()
        batch.inputs["tokens"][3, 4] = 64
        with pytest.raises(IndexError):
            parallel.forward_backward([batch], small.chunked_loss, 1)
        return True

    assert run_ranks(2, errors) == [True, True]


def _dims():
    from titan_parallel import ParallelDims

    return ParallelDims.Config().build(world_size=1, device_type="cpu")


def test_a_norm_that_is_not_finite_leaves_the_gradients_as_they_are(on_one_rank):
    def clip():
        first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        first.grad, second.grad = torch.tensor([float("nan"), 3.0]), torch.tensor([4.0, 5.0])
        scale_gradients_([first, second], gradient_norm([first, second], 1, "cpu"), max_norm=1.0)
        return first.grad.tolist()[1], second.grad.tolist()

    assert on_one_rank(clip) == (3.0, [4.0, 5.0])


def test_ranks_share_stacks_of_fewer_matrices_than_there_are_ranks(run_ranks, small):
    """In a dim that splits evenly, so that none holds a matrix more than others; a stack that does is split as such."""

    def shapes() -> list[tuple[int, ...]]:
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Module()])
        for name, shape in {"few": (3, 6, 8), "even": (4, 3, 8), "odd": (3, 5, 7), "matrix": (3, 8)}.items():
            setattr(model.layers[0], name, nn.Parameter(torch.zeros(shape)))
        parallelize(model, {"layers.*": "block"}, small.make_dims("fsdp2"))
        return [tuple(parameter.to_local().shape) for parameter in model.parameters()]

    first, second = run_ranks(2, shapes)
    assert first == [(3, 3, 8), (2, 3, 8), (2, 5, 7), (2, 8)]
    assert second == [(3, 3, 8), (2, 3, 8), (1, 5, 7), (1, 8)]
