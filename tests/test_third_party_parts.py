"""Third-party transforms and models with several stacks and streams, without an edit in the packages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import FullActivationCheckpoint, ParallelDims, RoleSpec, check_parallel, parallelize
from titan_parallel.check import meshes
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn
from torch.nn import functional


class GradientScale:
    """Multiply the gradients of modules with the role `scaled` by their `factor`, and check batches."""

    roles = {"scaled": RoleSpec(options={"factor"})}

    def __init__(self):
        self.seen = 0

    def validate(self, build):
        for name in build.roles.named("scaled"):
            if "factor" not in build.roles.options(name):
                raise ConfigError(f"The role scaled of {name} must have a factor, got none.")

    def apply(self, build):
        factors = {name: build.roles.options(name)["factor"] for name in build.roles.named("scaled")}

        def scale():
            for name, factor in factors.items():
                for parameter in build.model.get_submodule(name).parameters():
                    parameter.grad.mul_(factor)

        def count(batch, loss):
            self.seen += 1

        build.step.gradient_finalizers.append(scale)
        build.step.batch_checks.append(count)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids):
        x_BTD = self.words(ids)
        for layer in self.layers:
            x_BTD = x_BTD + layer(x_BTD)
        return self.head(x_BTD)


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def cross_entropy(head, hidden, targets):
    logits, labels = head(hidden), targets["labels"]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), labels.new_tensor(
        labels.numel()
    )


STACK_ROLES = {"words": "embedding", "layers.*": "block", "head": "head"}


def test_a_third_party_transform_adds_a_role_and_changes_a_step(run_ranks):
    ids = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(1))
    plain = seeded(Stack)
    loss = functional.cross_entropy(plain(ids).flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum")
    loss.backward()
    expected = {name: p.grad * (3 if name.startswith("layers.1.0.") else 1) for name, p in plain.named_parameters()}

    def on_rank():
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        rows = slice(dims.dp_rank * 2, dims.dp_rank * 2 + 2)
        batch = SimpleNamespace(
            inputs={"ids": ids[rows]}, targets={"labels": ids.roll(-1, 1)[rows]}, sequence_dims={"ids": 1, "labels": 1}
        )
        model, transform = seeded(Stack), GradientScale()
        table = STACK_ROLES | {"layers.1.0": ("scaled", {"factor": 3})}
        parallel = parallelize(model, table, dims, extra_transforms=[transform])
        parallel.forward_backward([batch], cross_entropy, 1)
        check_same_gradients(full_gradients(model), expected)
        assert transform.seen == 1
        with pytest.raises(ConfigError, match=r"The role scaled of layers\.1\.0 must have a factor"):
            parallelize(seeded(Stack), STACK_ROLES | {"layers.1.0": "scaled"}, dims, extra_transforms=[transform])
        with pytest.raises(ConfigError, match="scaled"):  # unknown without the transform
            parallelize(seeded(Stack), table, dims)

    run_ranks(2, on_rank)


class Doubling:
    """Multiply the output of modules by half of `factor`: 2 changes nothing."""

    roles = {"doubled": RoleSpec()}

    def __init__(self, factor=2.0):
        self.factor = factor

    def validate(self, build): ...

    def apply(self, build):
        for name in build.roles.named("doubled"):
            module = build.model.get_submodule(name)
            forward = module.forward
            module.forward = lambda x, forward=forward: forward(x) * (self.factor / 2)


@pytest.mark.parametrize(("factor", "ok"), [(2.0, True), (3.0, False)])
def test_check_parallel_verifies_a_third_party_transform(factor, ok):
    report = check_parallel(
        lambda: seeded(Stack),
        meshes("fsdp2"),
        roles=STACK_ROLES | {"layers.*.0": "doubled"},
        steps=1,
        extra_transforms=[Doubling(factor)],
        activation_checkpoint=FullActivationCheckpoint.Config(),
    )
    assert report.ok is ok, report


def test_ranks_with_other_transforms_are_refused(run_ranks):
    def on_rank():
        dims = ParallelDims.Config().build(world_size=2, device_type="cpu")
        extra = [GradientScale()] if torch.distributed.get_rank() else []
        with pytest.raises(ConfigError, match="extra_transforms"):
            parallelize(seeded(Stack), STACK_ROLES, dims, extra_transforms=extra)

    run_ranks(2, on_rank)


class JointAttention(nn.Module):
    """Attention of image and text tokens to all of both: a region with two streams."""

    def __init__(self):
        super().__init__()
        self.image_qkv, self.text_qkv = nn.Linear(16, 48), nn.Linear(16, 48)
        self.image_out, self.text_out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, image, text):
        both = [self._heads(self.image_qkv(image)), self._heads(self.text_qkv(text))]
        q, k, v = (torch.cat(parts, 2) for parts in zip(*both, strict=True))
        x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        length = image.size(1)
        return self.image_out(x[:, :length]), self.text_out(x[:, length:])

    def _heads(self, qkv):
        return (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))


class DoubleBlock(nn.Module):
    """A block with two streams."""

    def __init__(self):
        super().__init__()
        self.image_norm, self.text_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = JointAttention()

    def forward(self, image, text):
        image_change, text_change = self.attention(self.image_norm(image), self.text_norm(text))
        return image + image_change, text + text_change


class SingleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class TwoStacks(nn.Module):
    """Blocks of two streams and then blocks of one, as in diffusion transformers."""

    def __init__(self):
        super().__init__()
        self.words, self.patches = nn.Embedding(32, 16), nn.Linear(8, 16)
        self.pairs = nn.ModuleList(DoubleBlock() for _ in range(2))
        self.singles = nn.ModuleList(SingleBlock() for _ in range(2))
        self.head = nn.Linear(16, 8)

    def forward(self, pixels, ids):
        image, text = self.patches(pixels), self.words(ids)
        for block in self.pairs:
            image, text = block(image, text)
        x = torch.cat([text, image], 1)
        for block in self.singles:
            x = block(x)
        return self.head(x[:, text.size(1) :])


TWO_STACKS_ROLES = {
    "pairs.*": ("block", {"streams": 2}),
    "pairs.*.attention": ("region", {"streams": 2}),
    "pairs.*.attention.image_qkv": ("colwise", {"packed": 3, "num_heads": 4, "num_kv_heads": 4}),
    "pairs.*.attention.text_qkv": ("colwise", {"packed": 3, "num_heads": 4, "num_kv_heads": 4}),
    "pairs.*.attention.image_out": "rowwise",
    "pairs.*.attention.text_out": "rowwise",
    "singles.*": "block",
    "singles.*.mlp": "region",
    "singles.*.mlp.0": "colwise",
    "singles.*.mlp.2": "rowwise",
}


def squared_error(head, hidden, targets):
    error = head(hidden) - targets["pixels"]
    return error.square().sum(), torch.tensor(error.numel())


def two_stacks_batch():
    random = torch.Generator().manual_seed(2)
    pixels = torch.randn(8, 6, 8, generator=random, dtype=torch.float64)
    ids = torch.randint(32, (8, 5), generator=random)
    return SimpleNamespace(
        inputs={"pixels": pixels, "ids": ids}, targets={"pixels": -pixels}, sequence_dims={"pixels": 1, "ids": 1}
    )


def check_two_stacks(roles, *names):
    return check_parallel(
        lambda: seeded(TwoStacks), meshes(*names), roles=roles, batch=two_stacks_batch(), loss=squared_error, steps=2
    )


def test_a_model_of_two_stacks_and_two_streams_is_the_same_run():
    report = check_two_stacks(TWO_STACKS_ROLES, "fsdp2", "tp2", "fsdp2_tp2", "ddp2_fsdp2")
    assert report.ok, report


def test_a_second_stream_that_is_not_stated_is_noticed():
    assert not check_two_stacks(TWO_STACKS_ROLES | {"pairs.*.attention": "region"}, "tp2").ok


@pytest.mark.parametrize("degree", ["pipeline_parallel_degree", "context_parallel_degree"])
def test_what_needs_one_stream_says_so(run_ranks, degree):
    one_stack = {name: role for name, role in TWO_STACKS_ROLES.items() if not name.startswith("singles")}

    def on_rank():
        dims = ParallelDims.Config(**{degree: 2}).build(world_size=2, device_type="cpu")
        with pytest.raises(ConfigError, match=f"{degree} must be 1 for blocks of several residual streams, got 2"):
            parallelize(seeded(TwoStacks), one_stack, dims)

    run_ranks(2, on_rank)
