"""Third-party models with handwritten tables of roles."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import FullActivationCheckpoint, ParallelDims, parallelize
from titan_parallel.probe.float64 import computing_in
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn


class MixerLayer(nn.Module):
    """A layer without attention, whose projections have a second name in a Sequential."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.mlp = nn.Sequential(self.up, nn.GELU(), self.down)

    def forward(self, x_BTD):
        return x_BTD + self.mlp(self.norm(x_BTD)) * 0.5


class Mixer(nn.Module):
    """A model with learned positions, a scale on the residual stream, and an optionally tied head."""

    def __init__(self, tied):
        super().__init__()
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(8, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.stack = nn.Sequential(MixerLayer(), MixerLayer())
        self.norm = nn.LayerNorm(16)
        self.project = nn.Linear(16, 30, bias=False)
        if tied:
            self.project.weight = self.words.weight

    def forward(self, ids):
        x_BTD = (self.words(ids) + self.places(torch.arange(ids.size(1)))) * self.scale
        return self.project(self.norm(self.stack(x_BTD)))


MIXER_ROLES = {
    "words": "embedding",
    "places": "embedding",
    "stack.*": "block",
    "stack.*.mlp": "region",
    "stack.*.mlp.0": "colwise",
    "stack.*.mlp.2": "rowwise",
    "project": "head",
}


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def plain(model, batch, logits_of):
    count = int((batch.targets["labels"] != -100).sum())
    logits = logits_of(model(**batch.inputs))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets["labels"].flatten(), reduction="sum")
    (loss / count).backward()
    return {name: p.grad for name, p in model.named_parameters()}, count


def judged(small, make, roles, degrees, batch, output=None, **options):
    """Raise AssertionError if gradients differ from those of the plain model."""
    model = seeded(make)
    with small.in_fp64():
        expected, count = plain(model, batch, output or (lambda logits: logits))
    world_size = torch.distributed.get_world_size()
    dims = ParallelDims.Config(**degrees).build(world_size=world_size, device_type="cpu")
    model = seeded(make)
    parallel = parallelize(model, roles, dims, output=output, **options)
    rows = len(batch.targets["labels"]) // dims.dp_size
    part = slice(dims.dp_rank * rows, (dims.dp_rank + 1) * rows)
    mine = SimpleNamespace(
        inputs={name: tensor[part] for name, tensor in batch.inputs.items()},
        targets={name: tensor[part] for name, tensor in batch.targets.items()},
        sequence_dims=batch.sequence_dims,
    )
    with computing_in(torch.float64):  # also for recomputed forwards
        parallel.forward_backward([mine], small.chunked_loss, count)
    check_same_gradients(full_gradients(model), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_custom_model_equals_the_plain_model(run_ranks, small, tied):
    ids = torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(1))
    batch = SimpleNamespace(inputs={"ids": ids}, targets={"labels": ids.roll(-1, 1)}, sequence_dims={"ids": 1})

    def on_rank():
        for degrees in ({}, {"tensor_parallel_degree": 2}, {"tensor_parallel_degree": 2, "sequence_parallel": False}):
            judged(
                small,
                lambda: Mixer(tied),
                MIXER_ROLES,
                degrees,
                batch,
                activation_checkpoint=FullActivationCheckpoint.Config(),
            )

    run_ranks(2, on_rank)


def test_a_tied_weight_with_different_roles_raises(run_ranks, small):
    def on_rank():
        dims = ParallelDims.Config(tensor_parallel_degree=2, sequence_parallel=False).build(
            world_size=2, device_type="cpu"
        )
        roles = {pattern: role for pattern, role in MIXER_ROLES.items() if pattern != "words"}
        with pytest.raises(ConfigError, match=r"owners of the tied parameter weight .* along the same dim"):
            parallelize(Mixer(tied=True), roles, dims)

    run_ranks(2, on_rank)


LLAMA_ROLES = {
    "model.embed_tokens": "embedding",
    "model.layers.*": "block",
    "model.layers.*.self_attn": "region",
    "model.layers.*.self_attn.q_proj": ("colwise", {"num_heads": 4}),
    "model.layers.*.self_attn.k_proj": ("colwise", {"num_kv_heads": 2}),
    "model.layers.*.self_attn.v_proj": ("colwise", {"num_kv_heads": 2}),
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp": "region",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "head",
}


def test_llama_of_transformers_with_fsdp_and_tensor_parallel(run_ranks, small):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(1))
    batch = SimpleNamespace(
        inputs={"input_ids": ids}, targets={"labels": ids.roll(-1, 1)}, sequence_dims={"input_ids": 1}
    )

    def on_rank():
        def make():
            return transformers.LlamaForCausalLM(config)

        degrees = {"tensor_parallel_degree": 2, "sequence_parallel": False}
        judged(small, make, LLAMA_ROLES, degrees, batch, output=attrgetter("logits"))

    run_ranks(4, on_rank)
