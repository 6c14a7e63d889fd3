"""Tables of roles, and the errors of invalid ones."""

from __future__ import annotations

import pytest
from titan_config import ConfigError
from titan_parallel import Compile, FullActivationCheckpoint, ParallelDims, parallelize
from titan_parallel.parallelize import default_transforms, known_roles
from titan_parallel.sharding_plan.roles import Roles
from torch import nn

GROUPED_6_TO_3 = [("q", "num_heads", 6), ("k", "num_kv_heads", 3), ("v", "num_kv_heads", 3)]


def without(roles, *patterns):
    return {pattern: role for pattern, role in roles.items() if pattern not in patterns}


def test_a_star_matches_one_component_of_a_name(small):
    model = small.make_model(small.Shape(layers=11))
    roles = Roles(model, small.ROLES)
    assert roles.named("block") == [f"layers.{index}" for index in range(11)]
    assert roles.options("layers.10.attention.k") == {"num_kv_heads": 2}
    assert roles.region_of("layers.10.attention.q_norm.weight") == "layers.10.attention"
    assert roles.region_of("layers.1.attention_norm.weight") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm": "nrom"}, r"role of pattern 'norm' must be one of .* got 'nrom'\. Did you mean 'norm'\?"),
        ({"layer.*": "block"}, r"pattern 'layer\.\*' must match a module, got no match\. Did you mean 'layers\.\*'\?"),
        ({"layers.*.attention.qq": "colwise"}, r"Did you mean 'layers\.\*\.attention\.q'\?"),
        (
            {"layers.1": "norm"},
            r"layers\.1 must have one role, got block from pattern 'layers\.\*' and norm from pattern 'layers\.1'\.",
        ),
        ({"layers.*.attention.q": ("colwise", {"heads": 4})}, r"role colwise must .* 'heads'.* mean 'num_heads'\?"),
        ({"embedding": ("embedding", {"num_heads": 4})}, r"role embedding must be among between_blocks, .*num_heads"),
        ({"norm": "head"}, r"role head must be given to one module only, got norm, head\."),
        ({"layers": "block"}, r"A block must not contain another block, got layers\.0 inside layers\."),
        ({"layers.*.attention": "norm"}, r"role colwise must be used inside a region, got layers\.0\.attention\.q "),
        ({"layers.*.attention.sink": "per_head"}, r"must match a parameter, .* Did you mean 'layers\.\*\.attention"),
        ({"norm.weight": "per_head"}, r"role per_head must be used inside a region, got norm\.weight "),
        ({"layers.*.attention.out": "norm"}, r"A region must contain .* got layers\.0\.attention without rowwise\."),
    ],
)
def test_invalid_tables_raise_with_the_nearest_valid_name(small, change, says):
    with pytest.raises(ConfigError, match=says):
        Roles(small.make_model(), {**small.ROLES, **change}, known_roles(default_transforms()))


def test_activation_checkpointing_and_compile_need_blocks(on_one_rank, small):
    def check():
        for options in ({"activation_checkpoint": FullActivationCheckpoint.Config()}, {"compile": Compile.Config()}):
            with pytest.raises(ConfigError, match="must be None if no module has the role block"):
                parallelize(small.make_model(), without(small.ROLES, "layers.*"), small.make_dims("one"), **options)

    on_one_rank(check)


def test_models_that_cannot_be_split_raise_with_the_valid_degrees(run_ranks, small):
    def complaints():
        degrees = ParallelDims.Config(tensor_parallel_degree=2, sequence_parallel=True)
        dims = degrees.build(world_size=2, device_type="cpu")
        said = []
        for shape, change, gone in (
            (
                {"width": 48, "heads": 6, "kv_heads": 3},
                {f"layers.*.attention.{p}": ("colwise", {n: c}) for p, n, c in GROUPED_6_TO_3},
                (),
            ),
            ({"hidden": 45}, {}, ()),
            ({}, {"head": "norm"}, ()),
            ({}, {}, [pattern for pattern in small.ROLES if pattern not in ("embedding", "layers.*", "head")]),
            ({"vocab": 1}, {}, ()),
            ({}, {"embedding": "norm", "layers.*.attention_norm": "embedding"}, ()),
        ):
            with pytest.raises(ConfigError) as caught:
                parallelize(small.make_model(small.Shape(**shape)), {**without(small.ROLES, *gone), **change}, dims)
            said.append(str(caught.value))
        return said

    expected = [
        "tensor_parallel_degree must divide num_kv_heads (3) of layers.0.attention.k or be a multiple of it, got 2. "
        "Use 1, 3 or 6.",
        "tensor_parallel_degree must divide features (45) of layers.0.feed_forward.up, got 2. Use 1, 3, 5, 9, 15 or 45",
        "sequence_parallel must be false without an embedding, a head and one stack of blocks, got true.",
        "tensor_parallel_degree must be 1 for roles without a region, got 2.",
        "tensor_parallel_degree must give each rank at least one row of embedding (1), got 2.",
        "A module with the role embedding must have a matrix named weight, got a weight of shape [32] in "
        "layers.0.attention_norm.",
    ]
    for said in run_ranks(2, complaints):
        for complaint, beginning in zip(said, expected, strict=True):
            assert complaint.startswith(beginning)


def test_a_model_without_roles_equals_the_plain_model(run_ranks, small):
    batch = small.make_batch()
    expected_loss, expected, count = small.plain_step(small.make_model(), batch)

    def step():
        from titan_parallel.testing import check_same_gradients, full_gradients

        model = small.make_model()
        parallel = parallelize(model, {}, small.make_dims("fsdp2"))
        loss = parallel.forward_backward(small.micro_batches(batch, parallel.dims, 2), small.chunked_loss, count)
        check_same_gradients(full_gradients(model), expected)
        return float(loss)

    assert run_ranks(2, step) == pytest.approx([float(expected_loss)] * 2, rel=1e-12)


def test_a_function_selects_the_logits_of_an_output(run_ranks, small):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small.make_model()

        def forward(self, **inputs):
            return {"logits": self.inner(**inputs), "cache": None}

    batch = small.make_batch()
    expected_loss, _, count = small.plain_step(small.make_model(), batch)
    roles = {f"inner.{pattern}": role for pattern, role in small.ROLES.items()}

    def step():
        parallel = parallelize(Wrapped(), roles, small.make_dims("tp2_both"), output=lambda output: output["logits"])
        return float(parallel.forward_backward([batch], small.chunked_loss, count))

    assert run_ranks(2, step) == pytest.approx([float(expected_loss)] * 2, rel=1e-12)


class Pairs(nn.Module):
    """Two lists of layers."""

    def __init__(self):
        super().__init__()
        self.lower, self.upper = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (
            {"lower.0": "block", "lower.2": "block"},
            r"blocks of lower must be consecutive, got 1 between 0 and 2\..* to 1 too",
        ),
    ],
)
def test_blocks_of_one_parent_must_be_consecutive(roles, says):
    with pytest.raises(ConfigError, match=says):
        Roles(Pairs(), roles)


def test_a_pipeline_needs_a_single_stack(run_ranks):
    def said():
        dims = ParallelDims.Config(pipeline_parallel_degree=2).build(world_size=2, device_type="cpu")
        with pytest.raises(ConfigError) as caught:
            parallelize(Pairs(), {"lower.*": "block", "upper.*": "block"}, dims)
        return str(caught.value)

    for message in run_ranks(2, said):
        assert message.startswith(
            "pipeline_parallel_degree must be 1 for several stacks of blocks, got 2 with blocks in"
        )


class Fused(nn.Module):
    """Queries, keys and values in one projection, and sizes in attributes."""

    def __init__(self):
        super().__init__()
        self.n_head, self.width = 4, 32
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x_BTD):
        shape = (*x_BTD.shape[:2], self.n_head, self.width // self.n_head)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x_BTD).split(self.width, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_invalid_projection_options_raise_with_the_fix(run_ranks):
    sizes = {"n_head": "num_heads", "width": "features"}
    cases = [
        ({}, {}, "qkv must have the option packed, got 96 output features, of which out takes 32."),
        ({"packed": 5}, {}, "The options of qkv must divide its 96 features into equal parts, got 5 parts from "),
        ({"packed": 1, "num_heads": 4, "num_kv_heads": 2}, {}, "qkv, a single projection, must have only one of"),
        ({"packed": 3, "num_heads": 4}, {"n_heads": "num_heads"}, "{'n_heads': 'num_heads'}, where n_heads is None."),
        ({"packed": 3, "num_heads": 4}, {"n_head": "heads"}, "{'n_head': 'heads'}, where n_head is 4."),
        ({"packed": 3, "num_heads": 4}, sizes, ""),
    ]

    def said():
        dims = ParallelDims.Config(tensor_parallel_degree=2, sequence_parallel=False)
        messages = []
        for options, size, _ in cases:
            model = nn.Sequential(Fused())
            roles = {"0": ("region", {"set": size}), "0.qkv": ("colwise", options), "0.out": "rowwise"}
            try:
                parallelize(model, roles, dims.build(world_size=2, device_type="cpu"))
                messages.append("")
            except ConfigError as error:
                messages.append(str(error).replace("0.qkv", "qkv").replace("0.out", "out"))
        return messages

    for messages in run_ranks(2, said):
        for message, (_, _, words) in zip(messages, cases, strict=True):
            assert words in message and (message == "") == (words == "")
