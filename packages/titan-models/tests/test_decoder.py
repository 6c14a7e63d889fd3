"""The decoder: packed documents, head, tied weights, roles and config."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from typing import Any

import pytest
import titan_config
import torch
from titan_models import (
    Decoder,
    Flex,
    Llama3Scaling,
    Mask,
    Rope,
    RotaryPositions,
    Sdpa,
    SlidingWindow,
    TruncatedNormal,
    Varlen,
)
from titan_models.attention.temperature import Temperature
from titan_models.gpt_oss import gpt_oss_20b, gpt_oss_debug
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.rope import rotate, rotate_neighbors
from titan_models.layers.yarn import Yarn
from titan_models.llama3 import llama3_1b, llama3_8b, llama3_70b, llama3_405b, llama3_debug
from titan_models.llama4 import llama4_debug, llama4_scout
from titan_models.moe import ClampedGating, TopKRouter
from titan_models.qwen3 import qwen3_8b, qwen3_30b_a3b, qwen3_debug, qwen3_moe_debug
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

FLAVORS = [llama3_debug, llama3_1b, llama3_8b, llama3_70b, llama3_405b, qwen3_debug, qwen3_8b, qwen3_moe_debug]
FLAVORS += [llama4_debug, llama4_scout, gpt_oss_debug]
PACKED = (llama3_8b, qwen3_8b, qwen3_30b_a3b, llama4_debug)


@pytest.mark.parametrize(
    ("core", "flavor"),
    [
        *itertools.product((Sdpa.Config(), Flex.Config(block_size=16)), (*PACKED, gpt_oss_20b)),
        *itertools.product((Varlen.Config(),), PACKED),
    ],
)
def test_packed_documents_equal_the_documents_one_by_one(
    core: Any, flavor: Any, shrunk: Any, build_model: Any, packed: dict[str, Tensor]
) -> None:
    config = shrunk(flavor)
    for block in config.blocks():
        block.attention.core = core
    model = build_model(config, torch.float64)
    with torch.no_grad():
        logits = model(**packed)
        for row, ids in enumerate(packed["document_ids"]):
            for document in ids.unique():
                where = ids == document
                alone = model(packed["tokens"][row, where][None], packed["positions"][row, where][None])
                torch.testing.assert_close(logits[row, where], alone[0], rtol=0, atol=1e-10)


def test_the_tests_detect_attention_across_documents(
    shrunk: Any, build_model: Any, packed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(shrunk(llama3_8b), torch.float64)
    with torch.no_grad():
        logits = model(**packed)
        causal = Mask.causal
        monkeypatch.setattr(
            Mask, "causal", staticmethod(lambda positions, documents, mask_modifiers: causal(positions))
        )
        difference = (model(**packed) - logits).abs().amax(-1)
    first = packed["document_ids"] == packed["document_ids"][:, :1]
    assert difference[first].max() < 1e-10
    assert difference[~first].max() > 1e-4


def test_the_tests_detect_shifted_positions(shrunk: Any, build_model: Any, packed: dict[str, Tensor]) -> None:
    model = build_model(shrunk(llama3_8b))
    shifted = packed | {"positions": packed["positions"] + (packed["positions"] > 3)}
    with torch.no_grad():
        assert (model(**shifted) - model(**packed)).abs().max() > 1e-4


def test_sdpa_and_flex_give_the_same_logits(shrunk: Any, build_model: Any, packed: dict[str, Tensor]) -> None:
    config = shrunk(llama3_8b)
    with torch.no_grad():
        logits = build_model(config, torch.float64)(**packed)
        config.block.attention.core = Flex.Config(block_size=16)
        torch.testing.assert_close(build_model(config, torch.float64)(**packed), logits, rtol=0, atol=1e-10)


def test_gradients_through_flex_equal_those_through_sdpa(
    shrunk: Any, build_model: Any, packed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch rejects the backward of FlexAttention on CPUs; its eager path is exact."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)
    gradients = []
    for core in (Sdpa.Config(), Flex.Config(block_size=16)):
        config = shrunk(llama3_8b)
        config.block.attention.core = core
        model = build_model(config, torch.float64)
        functional.cross_entropy(model(**packed).flatten(0, 1), packed["tokens"].flatten()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-10 * one.norm() + 1e-13


def test_the_model_returns_what_its_head_returns(shrunk: Any, build_model: Any, packed: dict[str, Tensor]) -> None:
    """So that a training engine may replace the head to compute the loss."""
    model, result = build_model(shrunk(llama3_8b)), object()
    model.head.forward = lambda hidden: result
    assert model(**packed) is result


def test_a_token_beyond_the_vocabulary_raises(shrunk: Any, build_model: Any, packed: dict[str, Tensor]) -> None:
    with pytest.raises(IndexError):
        build_model(shrunk(llama3_8b))(packed["tokens"] + 97, packed["positions"])


def test_weights_stay_tied_through_to_empty_copies_and_casts(shrunk: Any) -> None:
    for model in (
        shrunk(llama3_1b).on_meta().to_empty(device="cpu"),
        shrunk(llama3_1b).build().to(torch.bfloat16),
        copy.deepcopy(shrunk(llama3_1b).build()),
        nn.Sequential(shrunk(llama3_1b).on_meta()).to_empty(device="cpu")[0],
    ):
        assert model.head.weight is model.embedding.weight
        assert not model.head.weight.is_meta
        assert [name for name, _ in model.named_parameters() if "head" in name] == []
        assert "head.weight" not in model.state_dict()


def test_a_tied_state_dict_loads_and_must_not_contain_the_head(shrunk: Any, build_model: Any) -> None:
    model, other = build_model(shrunk(llama3_1b)), shrunk(llama3_1b).build()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.head.weight, model.embedding.weight)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        other.load_state_dict(model.state_dict() | {"head.weight": torch.zeros(97, 48)})


@pytest.mark.parametrize("core", [Sdpa.Config(), Flex.Config(block_size=16)], ids=["sdpa", "flex"])
def test_identical_blocks_compile_once_whatever_the_documents(
    core: Any, shrunk: Any, build_model: Any, packed: dict[str, Tensor]
) -> None:
    config = shrunk(llama3_8b)
    config.block.attention.core = core
    model = build_model(config, torch.float64)
    other = packed | {"document_ids": packed["document_ids"] // 10, "positions": torch.arange(40).repeat(2, 1)}
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = [model(**packed), model(**other)]
        torch.compiler.reset()
        for layer in model.layers:
            layer.compile(backend=count, fullgraph=True)
        for batch, logits in zip((packed, other), expected, strict=True):
            torch.testing.assert_close(model(**batch), logits, rtol=0, atol=1e-10)
    assert len(compiled) == 1


@pytest.mark.parametrize("flavor", [llama3_8b, qwen3_30b_a3b, llama4_debug, gpt_oss_20b])
def test_recomputed_blocks_give_the_same_gradients(
    flavor: Any, shrunk: Any, build_model: Any, packed: dict[str, Tensor]
) -> None:
    gradients = []
    for recompute in (False, True):
        model = build_model(shrunk(flavor))
        for layer in model.layers if recompute else []:
            forward = layer.forward
            layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        functional.cross_entropy(model(**packed).flatten(0, 1), packed["tokens"].flatten()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_each_module_with_weights_has_one_role_except_qk_norms_routers_and_experts(flavor: Any) -> None:
    model = flavor().on_meta()
    roles = model.roles()
    for name, module in model.named_modules():
        fitting = [p for p in roles if len(p.split(".")) == len(name.split(".")) and fnmatch.fnmatch(name, p)]
        owns = next(module.parameters(recurse=False), None) is not None
        if name.endswith(("attention.q_norm", "attention.k_norm", ".router", ".experts")):
            owns = False
        assert len(fitting) == 1 or (not owns and not fitting), name
    of_parameters = {p for p, role in roles.items() if role == "per_head"}
    assert all(any(fnmatch.fnmatch(name, p) for name, _ in model.named_modules()) for p in roles.keys() - of_parameters)
    assert all(any(fnmatch.fnmatch(name, p) for name, _ in model.named_parameters()) for p in of_parameters)


def test_roles_of_the_8b_model() -> None:
    assert llama3_8b().on_meta().roles() == {
        "embedding": "embedding",
        "layers.*": "block",
        "layers.*.attention_norm": "norm",
        "layers.*.attention": "region",
        "layers.*.attention.q_proj": ("colwise", {"num_heads": 32}),
        "layers.*.attention.k_proj": ("colwise", {"num_heads": 8}),
        "layers.*.attention.v_proj": ("colwise", {"num_heads": 8}),
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.attention.core": "attention",
        "layers.*.feed_forward_norm": "norm",
        "layers.*.feed_forward": "region",
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
        "norm": "norm",
        "head": "head",
    }


def test_layer_overrides_replace_single_blocks(shrunk: Any, build_model: Any, packed: dict[str, Tensor]) -> None:
    config = shrunk(llama3_8b)
    config.layer_overrides = {"1": copy.deepcopy(config.block)}
    config.layer_overrides["1"].feed_forward.hidden_dim = 33
    config.layer_overrides["1"].attention.num_kv_heads = 1
    model = build_model(titan_config.from_json(titan_config.to_json(config)))
    assert [layer.feed_forward.down_proj.in_features for layer in model.layers] == [80, 33, 80]
    assert model.roles()["layers.1.attention.k_proj"] == ("colwise", {"num_heads": 1})
    assert model.roles()["layers.2.attention.k_proj"] == ("colwise", {"num_heads": 2})
    assert model(**packed).shape == (2, 40, 97)
    with pytest.raises(ValueError, match="must have the same num_kv_heads"):
        config.hf_adapter()


@pytest.mark.parametrize("flavor", FLAVORS)
def test_configs_survive_a_json_round_trip(flavor: Any) -> None:
    assert titan_config.from_json(titan_config.to_json(flavor())) == flavor()


def test_each_call_of_a_flavor_returns_a_new_config() -> None:
    changed = llama3_8b()
    changed.block.attention.output.weight_init = TruncatedNormal.Config(std=1.0)
    changed.block.feed_forward.hidden_dim = 1
    assert changed.block.feed_forward.down.weight_init == llama3_8b().block.attention.output.weight_init
    assert llama3_8b().block.feed_forward.hidden_dim == 14336


def test_invalid_configs_are_rejected_with_a_reason(shrunk: Any) -> None:
    def build(path: str, value: Any) -> None:
        config = shrunk(llama3_8b)
        *parents, name = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
        config.build()

    for path, value, message in [
        ("rope.dim", 6, r"rope.dim must be 8, .* got 6"),
        ("rope.dim", 7, "dim must be even .* got 7"),
        ("rope.theta", 0.5, "theta must be > 1, got 0.5"),
        ("rope.scaling.factor", 0.5, "factor must be >= 1, got 0.5"),
        ("rope.scaling.high_freq_factor", 0.5, r"low_freq_factor must be .* at most high_freq_factor \(0.5\), got 1.0"),
        ("rope.scaling.original_max_seq_len", 0, "original_max_seq_len must be at least 1, got 0"),
        (
            "block.attention.num_kv_heads",
            3,
            "num_heads must be a multiple of num_kv_heads.*num_heads 8, num_kv_heads 3",
        ),
        ("block.attention.num_heads", 0, "num_heads 0,"),
        ("block.feed_forward.hidden_dim", 0, "hidden_dim must be at least 1, got 0"),
        ("block.norm.eps", 0.0, "eps must be > 0, got 0.0"),
        ("num_layers", 0, "num_layers must be at least 1, got 0"),
        ("vocab_size", -1, "vocab_size must be at least 1, got -1"),
        ("dim", 0, "dim must be at least 1, got 0"),
        ("max_seq_len", 0, "max_seq_len must be at least 1, got 0"),
        (
            "layer_overrides",
            {"3": shrunk(llama3_8b).block},
            "layer_overrides must select at least one of the 3 blocks .* got '3'",
        ),
        ("layer_overrides", {"-1": shrunk(llama3_8b).block}, "block numbers or slices .* got '-1'"),
        (
            "layer_overrides",
            dict.fromkeys(["0::2", "2"], shrunk(llama3_8b).block),
            r"at most one key of layer_overrides, got several for blocks \[2\]",
        ),
        ("block.attention.core", Flex.Config(block_size=100), "block_size must be a multiple of 16 above 0, got 100"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(path, value)


def test_layer_overrides_select_blocks_as_slices_do(shrunk: Any) -> None:
    config = shrunk(llama3_8b)
    config.num_layers = 8
    other = copy.deepcopy(config.block)
    for numbers, layers in [("3", [3]), (":2", [0, 1]), ("6:", [6, 7]), ("1::3", [1, 4, 7])]:
        config.layer_overrides = {numbers: other}
        assert [layer for layer, block in enumerate(config.blocks()) if block is other] == layers


def test_layers_with_equal_masks_share_one_built_mask(
    shrunk: Any, build_model: Any, packed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks 0 and 2 have a sliding window; block 1 has another core as well."""
    config = shrunk(llama3_8b)
    config.layer_overrides = {"1": copy.deepcopy(config.block)}
    config.block.attention.mask_modifiers = [SlidingWindow.Config(size=3)]
    config.layer_overrides["1"].attention.core = Flex.Config(block_size=16)
    built = []
    for core in (Sdpa, Flex):
        build_mask = core.build_mask
        monkeypatch.setattr(
            core,
            "build_mask",
            lambda self, mask, build_mask=build_mask: built.append(mask.mask_modifiers) or build_mask(self, mask),
        )
    model = build_model(config)
    with torch.no_grad():
        logits = model(**packed)
        assert [len(mask_modifiers) for mask_modifiers in built] == [1, 0]
        tokens = packed["tokens"].clone()
        tokens[1, 5] += 1  # the first of a document of 35 tokens, all of which see it in block 1
        reached = (model(**packed | {"tokens": tokens}) - logits)[1].abs().amax(-1) > 0
        assert reached[5:].all()
        config.layer_overrides = {}
        model = build_model(config)
        reached = (model(**packed | {"tokens": tokens}) - model(**packed))[1].abs().amax(-1) > 0
    assert reached.nonzero().flatten().tolist() == [
        5,
        6,
        7,
        8,
        9,
        10,
        11,
    ]  # each of the three windows reaches 2 tokens further


@pytest.mark.parametrize("rotation", [rotate, rotate_neighbors])
def test_rotation_in_bf16_rounds_once(rotation: Any) -> None:
    """At any position, so that the error of q k is that of rounding q and k, not systematic in the distance."""
    generator = torch.Generator().manual_seed(0)
    rope = Rope.Config(dim=128, scaling=Llama3Scaling.Config(factor=8)).build()
    positions = torch.cat((torch.arange(512), torch.arange(8192 - 512, 8192), torch.arange(130_560, 131_072)))[None]
    cos, sin = rope(positions, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (1, 1536, 1, 64)
    angles = positions.double()[..., None] * rope.frequencies.double()
    assert (cos[:, :, 0].double() - angles.cos()).abs().max() < 2**-6  # fp32 numbers near 131,071 are 0.008 apart
    assert (sin[:, :, 0].double() - angles.sin()).abs().max() < 2**-6
    rotated, exact = [], []
    for _ in range(2):
        x = torch.randn(1, 1536, 8, 128, generator=generator).bfloat16()
        rotated.append(rotation(x, cos, sin))
        exact.append(rotation(x.double(), cos.double(), sin.double()))
        assert rotated[-1].dtype == torch.bfloat16
        half_a_step = exact[-1].abs() * 2**-8
        assert ((rotated[-1].double() - exact[-1]).abs() <= half_a_step * (1 + 1e-3) + 1e-6).all()
    scores, expected = ((q * k).sum(-1) / 128**0.5 for q, k in (map(torch.Tensor.double, rotated), exact))
    errors = scores - expected
    rounded = [x.bfloat16().double() for x in exact]
    least = (rounded[0] * rounded[1]).sum(-1) / 128**0.5 - expected
    assert errors.square().mean() <= 1.05 * least.square().mean()
    for part in errors.chunk(3, dim=1):
        assert part.mean().abs() <= 4 * part.std() / part.numel() ** 0.5


def test_a_model_initialized_from_the_meta_device_is_the_same(shrunk: Any, packed: dict[str, Tensor]) -> None:
    models = [shrunk(llama3_1b).build(), shrunk(llama3_1b).on_meta().to_empty(device="cpu")]
    for model in models:
        model.init_weights(seed=5)
    with torch.no_grad():
        assert torch.equal(models[0](**packed), models[1](**packed))


@pytest.mark.parametrize("flavor", [llama3_8b, qwen3_8b, gpt_oss_20b])
def test_attention_works_on_a_subset_of_heads(flavor: Any, shrunk: Any, build_model: Any) -> None:
    """The outputs of two halves of the heads add up to the whole output, as in tensor parallelism."""
    model = build_model(shrunk(flavor), torch.float64)
    x = torch.randn(2, 10, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(10).expand(2, 10)
    whole = model.layers[0].attention
    inputs = (
        x,
        RotaryPositions(positions, *model.rope(positions, x.dtype)),
        whole.core.build_mask(Mask.causal(positions)),
    )
    halves = []
    for half in (0, 1):
        part = copy.deepcopy(whole)
        for projection, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            linear = getattr(part, projection)
            linear.weight = nn.Parameter(linear.weight.chunk(2, dim)[half])
            if linear.bias is not None:  # the output bias is added once
                linear.bias = nn.Parameter(linear.bias.chunk(2)[half] if dim == 0 else linear.bias * (1 - half))
        if part.sinks is not None:
            part.sinks = nn.Parameter(part.sinks.chunk(2)[half])
        halves.append(part(*inputs))
    torch.testing.assert_close(halves[0] + halves[1], whole(*inputs), rtol=0, atol=1e-10)


def test_the_forward_creates_no_positions(
    shrunk: Any, build_model: Any, packed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(shrunk(llama3_8b))
    monkeypatch.setattr(torch, "arange", None)
    assert model(**packed).shape == (2, 40, 97)


def test_a_plain_decoder_equals_llama3_with_the_same_config(shrunk: Any, packed: dict[str, Tensor]) -> None:
    """Llama 3 is a config of the shared decoder: the same names, weights and logits without the family class."""
    family = shrunk(llama3_8b)
    config = Decoder.Config(**{name: copy.deepcopy(value) for name, value in vars(family).items()})
    models = [family.build(), config.build()]
    for model in models:
        model.init_weights(seed=5)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    with torch.no_grad():
        assert torch.equal(models[0](**packed), models[1](**packed))


def test_a_config_without_qk_norm_loads_with_the_default(shrunk: Any) -> None:
    data = titan_config.to_dict(shrunk(llama3_8b))
    del data["block"]["attention"]["qk_norm"]
    assert titan_config.from_dict(data) == shrunk(llama3_8b)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (RMSNorm, "eps"),
        (Rope, "theta"),
        (Llama3Scaling, "factor"),
        (Yarn, "factor"),
        (Yarn, "attention_factor"),
        (Temperature, "strength"),
        (ClampedGating, "limit"),
        (TopKRouter, "scale"),
    ],
)
def test_nan_is_rejected_in_configs(module: Any, name: str) -> None:
    needed = {Rope: {"dim": 8, "theta": 1e4}, Llama3Scaling: {"factor": 8.0}, Yarn: {"factor": 8.0}}
    settings = needed.get(module, {"num_experts": 4, "top_k": 1} if module is TopKRouter else {})
    module.Config(**settings).validate()
    with pytest.raises(ValueError, match=f"{name}.* got nan"):
        module.Config(**settings | {name: float("nan")}).validate()
