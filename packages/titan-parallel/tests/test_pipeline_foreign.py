"""Third-party models on a pipeline, with hand-written roles."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import ParallelDims, parallelize
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn

transformers = pytest.importorskip("transformers")

LLAMA_ROLES = {
    "model.embed_tokens": "embedding",
    "model.layers.*": "block",
    "model.layers.*.self_attn": "region",
    "model.layers.*.self_attn.q_proj": ("colwise", {"num_heads": 4}),
    "model.layers.*.self_attn.k_proj": ("colwise", {"num_heads": 2}),
    "model.layers.*.self_attn.v_proj": ("colwise", {"num_heads": 2}),
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp": "region",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "head",
}
GPT2_ROLES = {"transformer.wte": "embedding", "transformer.h.*": "block", "lm_head": "head"}
GEMMA_ROLES = {"model.embed_tokens": "embedding", "model.layers.*": "block", "lm_head": "head"}


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=48,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=16,
        attn_implementation="eager",
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def gemma3():
    """Return a model that alternates sliding-window and full attention by layer number, with scaled embeddings."""
    config = transformers.Gemma3TextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        sliding_window_pattern=2,
        attn_implementation="eager",
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


class TupleBlock(nn.Module):
    """Returns hidden states and an unused output."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x, flag=None):
        return x + torch.tanh(self.mix(self.norm(x))), flag


class TupleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(48, 16)
        self.stack = nn.ModuleList(TupleBlock() for _ in range(4))
        self.out = nn.Linear(16, 48)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.stack:
            x = block(x=x)[0]
        return SimpleNamespace(logits=self.out(x))


TUPLE_ROLES = {"words": "embedding", "stack.*": "block", "out": "head"}

CASES = {
    "Llama": (llama, LLAMA_ROLES, {}),
    "Llama, tied, V": (lambda: llama(tied=True), LLAMA_ROLES, {"pipeline_parallel_schedule": "ZBVZeroBubble"}),
    "Llama, tied, zero bubble": (
        lambda: llama(tied=True),
        LLAMA_ROLES,
        {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
    ),
    "GPT-2": (gpt2, GPT2_ROLES, {"pipeline_parallel_schedule": "Interleaved1F1B"}),
    "Gemma 3": (gemma3, GEMMA_ROLES, {"pipeline_parallel_schedule": "Interleaved1F1B"}),
    "tuples": (TupleModel, TUPLE_ROLES, {"pipeline_parallel_schedule": "Interleaved1F1B"}),
}


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def judge(small, make, roles, degrees, rows=8):
    """Return whether each parameter of this rank has a gradient; raise if one differs from the plain model's."""
    ids = torch.randint(48, (rows, 9), generator=torch.Generator().manual_seed(1))
    inputs, labels = {"input_ids": ids[:, :-1]}, ids[:, 1:]
    plain = seeded(make)
    with small.in_fp64():
        logits = plain(**inputs).logits
    (nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.numel()).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    dims = ParallelDims.Config(**{"pipeline_parallel_degree": 2, **degrees}).build(
        world_size=torch.distributed.get_world_size(), device_type="cpu"
    )
    model = seeded(make)
    parallel = parallelize(model, roles, dims, output=attrgetter("logits"))
    step = rows // (4 * dims.dp_size)
    first = dims.dp_rank * rows // dims.dp_size
    batches = [
        SimpleNamespace(
            inputs={"input_ids": ids[i : i + step, :-1]},
            targets={"labels": labels[i : i + step]},
            sequence_dims={"input_ids": 1, "labels": 1},
        )
        for i in range(first, first + 4 * step, step)
    ]
    with small.in_fp64():
        parallel.forward_backward(batches, small.chunked_loss, labels.numel())
    found = full_gradients(model)
    check_same_gradients(found, {name: expected[name] for name in found})
    return set(found) == {name for name, _ in model.named_parameters()}


def on_all(small, names, more):
    return [judge(small, CASES[name][0], CASES[name][1], {**CASES[name][2], **more}) for name in names]


def test_third_party_models_on_two_ranks(run_ranks, small):
    for found in run_ranks(2, on_all, small, list(CASES), {}):
        assert all(found)


@pytest.mark.full
def test_third_party_models_on_two_ranks_and_two_of_another_axis(run_ranks, small):
    for found in run_ranks(4, on_all, small, ["Llama", "Llama, tied, zero bubble"], {"tensor_parallel_degree": 2}):
        assert all(found)
    for found in run_ranks(4, on_all, small, list(CASES), {"data_parallel_replicate_degree": 2}):
        assert all(found)


class Unpacking(TupleModel):
    """Unpacks the output of a block."""

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.stack:
            x, _ = block(x=x)
        return SimpleNamespace(logits=self.out(x))


def test_unpacking_the_output_of_a_block_raises_on_every_rank(run_ranks, small):
    def run():
        with pytest.raises(ConfigError, match="unpacks the output of a block"):
            judge(small, Unpacking, TUPLE_ROLES, {"pipeline_parallel_schedule": "Interleaved1F1B"})

    run_ranks(2, run)
