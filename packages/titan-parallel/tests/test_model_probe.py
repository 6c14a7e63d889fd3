"""Modules that mix tokens: the probe finds them, and sequence or context parallel is rejected or off."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import ParallelDims, check_parallel, parallelize, per_token
from titan_parallel.check import meshes
from titan_parallel.probe.cheap_copy import cheap_copy
from titan_parallel.probe.forwards import RandomDraws
from titan_parallel.probe.model_probe import ModelProbe
from titan_parallel.probe.repeated_blocks import representatives
from titan_parallel.probe.verdict import Verdict
from titan_parallel.sharding_plan.roles import Roles
from torch import nn
from torch.nn import functional

WIDTH = 16


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x):
        return self.conv(x.transpose(1, 2))[..., : x.size(1)].transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class RunningSum(nn.Module):
    def forward(self, x):
        return 0.1 * x.cumsum(1)


class Gated(nn.Module):
    """A mixer behind a zero-initialized gate."""

    def __init__(self):
        super().__init__()
        self.mixer, self.gate = Convolution(), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return self.mixer(x) * self.gate


class TopTokens(nn.Module):
    """A router that selects half of the tokens of a sequence."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x):
        scores = self.score(x).squeeze(-1)
        kept = torch.zeros_like(scores).scatter(1, scores.topk(x.size(1) // 2, -1).indices, 1.0)
        return x * kept[..., None]


class Block(nn.Module):
    def __init__(self, mixer, index):
        super().__init__()
        self.norm, self.mixer, self.index = nn.LayerNorm(WIDTH), mixer, index
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.norm(x))


class NormOfTokens(nn.Module):
    """Batch norm, which mixes tokens in train mode only."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class MixesInTraining(Convolution):
    def forward(self, x):
        return super().forward(x) if self.training else x


class Jitters(nn.Module):
    """A token-wise module with noise in train mode: a dropout function and a dropout module."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(functional.dropout(x, 0.1, self.training))


class ShiftInTheFifth(Block):
    """The forward of one block, the fifth, mixes tokens."""

    def forward(self, x):
        shifted = functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().forward(x + shifted if self.index == 5 else x)


class Model(nn.Module):
    def __init__(self, mixer, block=Block, num_blocks=2):
        super().__init__()
        self.words, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(block(mixer(), index) for index in range(num_blocks))

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ROLES = {
    "words": "embedding",
    "blocks.*": "block",
    "blocks.*.mlp": "region",
    "blocks.*.mlp.0": "colwise",
    "blocks.*.mlp.2": "rowwise",
    "head": "head",
}
MIXERS = {
    "blocks.0.mixer (Convolution)": lambda: Model(Convolution),
    "blocks.0.mixer (Attention)": lambda: Model(Attention),
    "blocks.0.mixer (RunningSum)": lambda: Model(RunningSum),
    "blocks.0.mixer (Gated)": lambda: Model(Gated),
    "blocks.0.mixer (TopTokens)": lambda: Model(TopTokens),
    "blocks.0.mixer (NormOfTokens)": lambda: Model(NormOfTokens),
    "blocks.0.mixer (MixesInTraining)": lambda: Model(MixesInTraining),
    "blocks.5 (ShiftInTheFifth)": lambda: Model(nn.Identity, ShiftInTheFifth, 6),
}


def test_sequence_parallel_is_rejected_for_blocks_that_mix_tokens_and_off_by_default(run_ranks):
    def run():
        requested, default = (
            ParallelDims.Config(tensor_parallel_degree=2, sequence_parallel=choice).build(
                world_size=2, device_type="cpu"
            )
            for choice in (True, None)
        )
        messages = {}
        for name, make in MIXERS.items():
            with pytest.raises(ConfigError) as caught:
                parallelize(make(), ROLES, requested)
            messages[name] = str(caught.value)
            assert not parallelize(make(), ROLES, default).dims.sequence_parallel
        for mixer in (lambda: nn.Linear(WIDTH, WIDTH), Jitters):
            assert parallelize(Model(mixer), ROLES, requested).dims.sequence_parallel
            assert parallelize(Model(mixer), ROLES, default).dims.sequence_parallel
        return messages

    for messages in run_ranks(2, run):
        for name, message in messages.items():
            assert name in message and "the role region" in message and "sequence_parallel to false" in message


def test_a_model_that_mixes_tokens_trains_correctly_by_default():
    report = check_parallel(
        lambda: Model(Convolution), ParallelDims.Config(tensor_parallel_degree=2), roles=ROLES, steps=1
    )
    assert report.ok, report


def test_sequence_parallel_is_wrong_without_the_probe(monkeypatch):
    monkeypatch.setattr(ModelProbe, "sequence", lambda self: Verdict(True))
    report = check_parallel(lambda: Model(Convolution), meshes("tp2_sp"), roles=ROLES, steps=1)
    assert report.meshes["tp2_sp"].findings


def hybrid(name, **changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **changes})
    return lambda: transformers.AutoModelForCausalLM.from_config(config)


MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
HYBRIDS = {
    "JambaMambaMixer": (
        "Jamba",
        {
            "num_experts": 2,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "FalconH1Mixer": ("FalconH1", {**MAMBA_2, "head_dim": 8, "mamba_d_ssm": 64}),
    "Lfm2ShortConv": ("Lfm2", {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"]}),
    "MiniMaxLightningAttention": (
        "MiniMax",
        {**MOE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    ),
    "GraniteMoeHybridMambaLayer": (
        "GraniteMoeHybrid",
        {**MAMBA_2, **MOE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    ),
    "BambaMixer": ("Bamba", {**MAMBA_2, "attn_layer_indices": [1]}),
    "RecurrentGemmaRecurrentBlock": (
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 8, "head_dim": 8, "block_types": ["recurrent", "attention"]},
    ),
}


@pytest.mark.parametrize(
    "mixers",
    [("JambaMambaMixer", "Lfm2ShortConv"), pytest.param(tuple(HYBRIDS)[1:], marks=pytest.mark.full)],
)
def test_context_parallel_is_rejected_for_models_that_mix_tokens_outside_attention(run_ranks, mixers):
    builders = {mixer: hybrid(HYBRIDS[mixer][0], **HYBRIDS[mixer][1]) for mixer in mixers}

    def run():
        dims = ParallelDims.Config(context_parallel_degree=2).build(world_size=2, device_type="cpu")
        messages = {}
        for mixer, build in builders.items():
            torch.manual_seed(0)
            with pytest.raises(ConfigError) as caught:
                parallelize(build(), {}, dims)
            messages[mixer] = str(caught.value)
        torch.manual_seed(0)
        parallelize(hybrid("Llama")(), {}, dims)
        return messages

    for messages in run_ranks(2, run):
        for mixer, message in messages.items():
            assert f"({mixer}) mixes tokens" in message and "context_parallel_degree to 1" in message


def test_context_parallel_is_wrong_without_the_probe(monkeypatch):
    monkeypatch.setattr(ModelProbe, "context", lambda self, *_: Verdict(True))
    name, changes = HYBRIDS["Lfm2ShortConv"]
    report = check_parallel(hybrid(name, **changes), meshes("cp2"), roles={"model.layers.*": "block"}, steps=1)
    assert report.meshes["cp2"].findings


class Core(nn.Module):
    """A causal attention core with the interface of context parallel."""

    def build_mask(self, mask):
        return mask.visible()[:, None]

    def forward(self, q, k, v, mask, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


class Pixels(nn.Module):
    """A model with unknown inputs before the first batch, and optionally a convolution before its attention core."""

    def __init__(self, mixes):
        super().__init__()
        self.project = nn.Linear(4, WIDTH)
        self.mixer, self.core = Convolution() if mixes else nn.Identity(), Core()

    def forward(self, patches, positions):
        x = self.mixer(self.project(patches))
        mask = self.core.build_mask(Causal(positions, positions))
        return self.core(*[x.unflatten(-1, (4, 4))] * 3, mask, 0.5).flatten(2)


class Causal(SimpleNamespace):
    query_documents = key_documents = None

    def __init__(self, query_positions, key_positions):
        super().__init__(query_positions=query_positions, key_positions=key_positions)

    def visible(self):
        return self.query_positions[:, :, None] >= self.key_positions[:, None, :]


def test_a_model_with_unknown_inputs_is_probed_with_the_first_batch(run_ranks):
    batch = SimpleNamespace(
        inputs={"patches": torch.randn(2, 16, 4), "positions": torch.arange(16).repeat(2, 1)},
        targets={"expected": torch.randn(2, 16, WIDTH)},
        sequence_dims={"patches": 1, "positions": 1, "expected": 1},
    )

    def run():
        dims = ParallelDims.Config(context_parallel_degree=2).build(world_size=2, device_type="cpu")
        torch.manual_seed(0)
        parallel = parallelize(Pixels(mixes=True), {"core": "attention"}, dims)
        with pytest.raises(ConfigError) as caught:
            parallel.forward_backward([batch], per_token(lambda head, x, targets: (x.sum(), torch.tensor(1))), 1.0)
        return str(caught.value)

    for message in run_ranks(2, run):
        assert "mixer (Convolution) mixes tokens" in message


def test_random_draws_are_detected():
    for draw in (lambda: torch.rand(1), random.random):
        draws = RandomDraws()
        with draws:
            pass
        assert not draws.seen
        with draws:
            draw()
        assert draws.seen


def test_a_probe_does_not_change_the_model_or_random_state():
    model = Model(Attention).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state(), random.getstate()
    assert ModelProbe(model, Roles(model, ROLES)).sequence().proved is False
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert model.training and all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_probe_of_a_large_model_on_meta_takes_little_memory():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, vocab_size=128256))
    copied = cheap_copy(model, ())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in copied.parameters()}
    assert sum(storages.values()) < 1e-3 * sum(4 * p.numel() for p in model.parameters())
    verdict = ModelProbe(model, Roles(model, {"model.layers.*": "block"})).context()
    assert verdict == Verdict(True)


class Conditioned(nn.Module):
    """A token-wise block with a region, both called with the conditioning before the hidden states."""

    def __init__(self):
        super().__init__()
        self.mlp = Modulated()

    def forward(self, x, cond):
        return x + self.mlp(cond=cond, x=x)


class Modulated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x, cond):
        return self.down(torch.tanh(self.up(x) + cond.mean()))


class ByKeyword(nn.Module):
    def __init__(self, num_blocks):
        super().__init__()
        self.words, self.cond, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(Conditioned() for _ in range(num_blocks))

    def forward(self, ids):
        x, cond = self.words(ids), self.cond.weight.sum(1)
        for block in self.blocks:
            x = block(cond=cond, x=x)
        return self.head(x)


def test_hidden_states_that_are_not_the_first_keyword_are_found():
    roles = {
        **{"words": "embedding", "blocks.*": "block", "head": "head", "blocks.*.mlp": "region"},
        **{"blocks.*.mlp.up": "colwise", "blocks.*.mlp.down": "rowwise"},
    }
    for num_blocks in (2, 18):  # with many blocks, later ones are skipped
        model = ByKeyword(num_blocks)
        assert ModelProbe(model, Roles(model, roles)).sequence() == Verdict(True)


class Setting:
    """An object with a setting of a block, and its layer index."""

    def __init__(self, shift, layer_idx):
        self.inner, self.layer_idx = SimpleNamespace(shift=shift), layer_idx


class ByObject(nn.Module):
    def __init__(self, setting):
        super().__init__()
        self.linear, self.setting = nn.Linear(WIDTH, WIDTH), setting

    def forward(self, x):
        shift = self.setting.inner.shift
        return x + self.linear(functional.pad(x, (0, 0, shift, 0))[:, : x.size(1)])


def test_blocks_with_settings_in_an_object_are_equivalent_only_if_all_settings_are_equal():
    roles = {"words": "embedding", "blocks.*": "block", "head": "head"}
    for mixing in (None, 17):
        model = Model(nn.Identity)
        model.blocks = nn.ModuleList(ByObject(Setting(int(i == mixing), i)) for i in range(18))
        verdict = ModelProbe(model, Roles(model, roles)).sequence()
        assert verdict.proved is (mixing is None), verdict
        kinds = representatives(model, Roles(model, roles))
        assert (kinds[model.blocks[17]] is model.blocks[17]) is (mixing is not None)


class Slight(nn.Module):
    """Mixes tokens by an amount that float32 rounding would hide."""

    def forward(self, x):
        return 1e-7 * x.mean(1, keepdim=True)


class Float32Only(nn.Module):
    """Does not run in float64."""

    def forward(self, x):
        if x.dtype is torch.float64:
            raise TypeError("float32 only")
        return x


def test_the_probe_runs_in_float64_where_the_model_does():
    for mixer, proved in ((Slight, False), (Float32Only, True)):
        model = Model(mixer)
        assert ModelProbe(model, Roles(model, ROLES)).sequence().proved is proved


class FarShift(nn.Module):
    """Each token receives the one 32 tokens before it."""

    def forward(self, x):
        return functional.pad(x, (0, 0, 32, 0))[:, : x.size(1)]


class ChunkBefore(nn.Module):
    """Each token receives the mean of the previous chunk of 32 tokens."""

    def forward(self, x):
        chunks = functional.pad(x, (0, 0, 32, -x.size(1) % 32)).unflatten(1, (-1, 32)).mean(2)
        return chunks.repeat_interleave(32, 1)[:, : x.size(1)]


class Capacity(nn.Module):
    """An expert with a capacity of 40 tokens."""

    def forward(self, x):
        taken = x.mean(-1, keepdim=True) > 0
        return x * (taken & (taken.cumsum(1) <= 40))


class LearnedPositions(nn.Module):
    """Token-wise, with a maximum sequence length of 100 tokens."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(100, WIDTH)

    def forward(self, x):
        return x + 0 * self.positions(torch.arange(x.size(1)))


def test_mixing_at_a_distance_and_limits_on_many_tokens_are_found():
    no_regions = {"blocks.*": "block", "head": "head"}
    for mixer, proved in ((FarShift, False), (ChunkBefore, False), (Capacity, False), (LearnedPositions, True)):
        model = Model(mixer)
        assert ModelProbe(model, Roles(model, ROLES)).sequence().proved is proved, mixer
        assert ModelProbe(model, Roles(model, no_regions)).context().proved is proved, mixer


def test_a_first_batch_is_probed_beyond_its_first_tokens():
    class FarPixels(Pixels):
        def __init__(self):
            super().__init__(mixes=False)
            self.mixer = FarShift()

    model = FarPixels()
    inputs = {"patches": torch.randn(2, 128, 4), "positions": torch.arange(128).repeat(2, 1)}
    probe = ModelProbe(model, Roles(model, {"core": "attention"}))
    assert probe.context(inputs, {"patches": 1, "positions": 1}).proved is False
