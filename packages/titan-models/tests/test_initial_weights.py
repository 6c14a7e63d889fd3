"""Initial weights depend only on seed, name and position."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import titan_config
import torch
from titan_models import Constant, DepthScaledNormal, FanInNormal, Initializer, Normal, TruncatedNormal, init_weights
from titan_models.deepseek import deepseek_v3_debug
from titan_models.gpt_oss import gpt_oss_debug
from titan_models.initialization import counter_based_rng as rng
from titan_models.llama3 import llama3_8b, llama3_debug
from titan_models.llama4 import llama4_debug
from titan_models.qwen3 import qwen3_debug, qwen3_moe_debug
from torch import Tensor, nn


def drawn(initializer: Initializer.Config, *shape: int, seed: int = 0, name: str = "w") -> Tensor:
    tensor = torch.empty(shape)
    location = rng.ShardLocation(rng.key_of(seed, name), shape, (0,) * len(shape))
    initializer.build().fill_(tensor, location)
    return tensor


def test_random_numbers_are_those_of_numpy_philox() -> None:
    """The tiling is a format: number n of tile t is the n-th 32-bit word of the counter range of that tile."""
    tensor = torch.empty(300, 200)
    location = rng.ShardLocation(rng.key_of(5, "layers.0.w"), (300, 200), (0, 0))
    rng.fill_with_uniform_(tensor, location, lambda uniform: uniform)
    tiles_across, numbers = math.ceil(200 / 128), 128 * 128
    for row, column in [(0, 0), (1, 127), (127, 128), (128, 0), (299, 199)]:
        tile = (row // 128) * tiles_across + column // 128
        generator = np.random.Philox(key=rng.key_of(5, "layers.0.w"), counter=tile * numbers // 8)
        words = generator.random_raw(numbers // 2).view("<u4")
        word = int(words[(row % 128) * 128 + column % 128])
        signed = word - 2**32 if word >= 2**31 else word
        assert tensor[row, column].item() == ((signed >> 8) + 0.5) / 2**23


@pytest.mark.parametrize("shape", [(300, 200), (5,), (1000,), (3, 200, 150), (2, 3, 10, 130)])
def test_any_shard_can_be_initialized_by_itself(shape: tuple[int, ...]) -> None:
    whole = drawn(Normal.Config(), *shape)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        starts = [int(torch.randint(0, n, (), generator=generator)) for n in shape]
        sizes = [int(torch.randint(0, n - s + 1, (), generator=generator)) for n, s in zip(shape, starts, strict=True)]
        part = torch.full(sizes, torch.nan)
        Normal.Config().build().fill_(part, rng.ShardLocation(rng.key_of(0, "w"), shape, tuple(starts)))
        assert torch.equal(part, whole[tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))])


def test_the_tests_detect_another_tile_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(Normal.Config(), 300, 200)
    monkeypatch.setattr(rng, "TILE", 64)
    assert not torch.equal(drawn(Normal.Config(), 300, 200), whole)


def test_bits_do_not_depend_on_threads_or_tiles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(TruncatedNormal.Config(), 1000, 3000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr(rng, "_TILES_AT_ONCE", 3)
        assert torch.equal(drawn(TruncatedNormal.Config(), 1000, 3000), whole)
    finally:
        torch.set_num_threads(threads)


def test_normal_has_the_moments_of_a_normal_distribution() -> None:
    x = drawn(Normal.Config(std=0.5), 1000, 1000).double() / 0.5
    assert abs(x.mean()) < 0.005
    assert abs(x.std() - 1) < 0.005
    assert abs(x.pow(4).mean() - 3) < 0.03
    assert abs((x < -1).double().mean() - 0.158655) < 0.002
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 0.005
    assert abs((x[1:] * x[:-1]).mean()) < 0.005


def test_truncated_normal_ends_at_the_cutoff_without_clamping() -> None:
    x = drawn(TruncatedNormal.Config(std=2.0, cutoff=1.5), 1000, 1000).double() / 2
    assert 1.4999 < x.abs().max() <= 1.5001
    inside = math.erf(1 / math.sqrt(2)) / math.erf(1.5 / math.sqrt(2))
    assert abs((x.abs() < 1).double().mean() - inside) < 0.002
    assert (x.abs() > 1.499).double().mean() < 0.001


def test_fan_in_normal_preserves_the_variance_of_its_input() -> None:
    x = drawn(FanInNormal.Config(), 1000, 900).double() * 30
    inside = math.erf(1 / math.sqrt(2)) / math.erf(3 / math.sqrt(2))
    assert abs((x.abs() < 1).double().mean() - inside) < 0.002
    assert 2.99 < x.abs().max() <= 3.001
    assert abs(x.std() - 0.986) < 0.003


def test_depth_scaled_normal_decreases_with_the_layer_number() -> None:
    for layer in (0, 1, 7):
        tensor = torch.empty(1000, 1000)
        location = rng.ShardLocation(rng.key_of(0, f"layers.{layer}.w"), (1000, 1000), (0, 0), layer)
        DepthScaledNormal.Config(std=0.5).build().fill_(tensor, location)
        assert abs(tensor.std() / (0.5 / math.sqrt(2 * (layer + 1))) - 1) < 0.005
    with pytest.raises(ValueError, match=r"layer number in its name.*got one without\. Use Normal"):
        drawn(DepthScaledNormal.Config(), 3, 4)


def test_constant_is_constant() -> None:
    assert torch.equal(drawn(Constant.Config(value=0.0), 3, 4), torch.zeros(3, 4))
    assert torch.equal(drawn(Constant.Config(value=1.0), 5), torch.ones(5))


def test_other_seeds_and_names_give_other_numbers() -> None:
    draws = [
        drawn(Normal.Config(), 64, 64, seed=seed, name=name)
        for seed, name in [(0, "a"), (1, "a"), (0, "b"), (2**32, "a"), (-1, "a")]
    ]
    for i, first in enumerate(draws):
        assert not any(torch.equal(first, other) for other in draws[:i])


def test_parameters_are_nan_until_they_are_initialized(shrunk: Any) -> None:
    model = shrunk(llama3_8b).build()
    assert all(parameter.isnan().all() for parameter in model.parameters())
    model.init_weights(seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_other_dtypes_have_the_same_numbers_cast(shrunk: Any) -> None:
    models = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        models[dtype] = shrunk(llama3_8b).on_meta().to(dtype).to_empty(device="cpu")
        models[dtype].init_weights(seed=3)
    for name, parameter in models[torch.float32].named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), models[torch.bfloat16].get_parameter(name))
        assert torch.equal(parameter.double(), models[torch.float64].get_parameter(name))


def test_config_fields_choose_the_initializers(shrunk: Any) -> None:
    config = shrunk(llama3_8b)
    config.block.attention.output.weight_init = Constant.Config(value=0.0)
    config.embedding.weight_init = Normal.Config(std=1.0)
    model = config.build()
    model.init_weights(seed=0)
    assert not model.layers[1].attention.o_proj.weight.any()
    assert 0.9 < model.embedding.weight.std() < 1.1
    assert 0.018 < model.layers[0].attention.q_proj.weight.std() < 0.022
    assert torch.equal(model.norm.weight, torch.ones(48))


def test_the_first_loss_of_the_debug_flavor_is_that_of_random_guessing() -> None:
    """The head maps normalized hidden states to logits of variance 1, whose loss is 0.5 nats above ln V."""
    model = llama3_debug().build()
    model.init_weights(seed=0)
    tokens = torch.randint(2048, (2, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :-1], torch.arange(128).expand(2, 128))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - math.log(2048) - 0.5) < 0.1


UNIT, HEAD, PLAIN, BY_LAYER, BY_DEPTH = "1", "fan in", "0.02", "by layer", "by number of layers"
SCHEMES: dict[str, tuple[Any, dict[str, str]]] = {
    "llama3": (
        llama3_debug,
        {"embedding": UNIT, "head": HEAD, "[qkv]_proj|gate_proj": PLAIN, "o_proj|up_proj|down_proj": BY_LAYER},
    ),
    "qwen3": (qwen3_debug, {"embedding": PLAIN, "_proj": PLAIN}),
    "qwen3 with experts": (
        qwen3_moe_debug,
        {
            "embedding": PLAIN,
            "head": PLAIN,
            "router": PLAIN,
            "[qkv]_proj|gate_proj|up_proj": PLAIN,
            "o_proj|down_proj": BY_DEPTH,
        },
    ),
    "deepseek": (
        deepseek_v3_debug,
        {
            "embedding": UNIT,
            "head": HEAD,
            "router": BY_LAYER,
            "o_proj|feed_forward.*(up|down)_proj": BY_LAYER,
            "attention|gate_proj": PLAIN,
        },
    ),
    "llama4": (
        llama4_debug,
        {
            "embedding": UNIT,
            "head": HEAD,
            "router": BY_LAYER,
            "[qkv]_proj|gate_proj": PLAIN,
            "o_proj|up_proj|down_proj": BY_LAYER,
        },
    ),
    "gpt_oss": (gpt_oss_debug, {"embedding": PLAIN, "head": HEAD, "layers": BY_LAYER}),
}
"""Standard deviations in torchtitan 0.3.0 (Llama 4: 0.2), models/*/__init__.py, by the first matching pattern."""


@pytest.mark.parametrize("family", SCHEMES)
def test_initial_weights_are_distributed_as_those_of_the_reference(family: str) -> None:
    flavor, scheme = SCHEMES[family]
    model = flavor().build()
    model.init_weights(seed=1)
    num_layers = model.config.num_layers
    seen = set()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        if name.endswith("bias") and "experts" not in name:
            assert not parameter.any(), name
            continue
        pattern = next(pattern for pattern in scheme if re.search(pattern, name))
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        expected = {
            UNIT: 1.0,
            HEAD: parameter.shape[-1] ** -0.5,
            PLAIN: 0.02,
            BY_LAYER: 0.02 / math.sqrt(2 * (layer + 1)),
            BY_DEPTH: 0.02 / math.sqrt(2 * num_layers),
        }[scheme[pattern]]
        assert abs(parameter.std() / expected - 1) < 0.02 + 5 / (2 * parameter.numel()) ** 0.5, name
        seen.add(pattern)
    assert seen == set(scheme)


def test_all_initializers_can_be_replaced_in_the_config() -> None:
    """DeepSeek's report: 0.006 for all."""

    def draws(node: Any) -> bool:
        return isinstance(node, Initializer.Config) and not isinstance(node, Constant.Config)

    config = titan_config.replace(deepseek_v3_debug(), draws, Normal.Config(std=0.006))
    model = config.build()
    model.init_weights(seed=1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            assert abs(parameter.std() / 0.006 - 1) < 0.02 + 5 / (2 * parameter.numel()) ** 0.5, name


def test_a_parameter_without_an_initializer_is_an_error(shrunk: Any) -> None:
    model = shrunk(llama3_8b).build()
    model.layers[1].extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"layers\.1\.extra\.weight"):
        model.init_weights(seed=0)


def test_initializing_a_model_on_the_meta_device_is_an_error(shrunk: Any) -> None:
    with pytest.raises(ValueError, match="to_empty"):
        init_weights(shrunk(llama3_8b).on_meta(), seed=0)


@pytest.mark.parametrize(
    "wrong", [Normal.Config(std=0.0), TruncatedNormal.Config(cutoff=-1.0), FanInNormal.Config(cutoff=0.0)]
)
def test_invalid_distributions_are_rejected(wrong: Initializer.Config) -> None:
    with pytest.raises(ValueError, match="of an initializer must be > 0"):
        wrong.build()
