"""YaRN frequencies and factors are bitwise those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import Rope, Yarn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

GPT_OSS: dict[str, Any] = {"factor": 32.0, "truncate": False}
DEEPSEEK_V3: dict[str, Any] = {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK_V2_LITE: dict[str, Any] = {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
KIMI_K2: dict[str, Any] = {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("dim", "theta", "fields"),
    [
        (64, 150_000.0, GPT_OSS),
        (64, 10_000.0, DEEPSEEK_V3),
        (64, 10_000.0, DEEPSEEK_V2_LITE),
        (64, 150_000.0, GPT_OSS | {"truncate": True}),
        (128, 1e6, {"factor": 4.0, "original_max_seq_len": 32_768}),
        (128, 1e6, {"factor": 4.0, "mscale": 0.5}),  # no effect without mscale_all_dim
        (128, 1e6, {"factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.5}),
        (128, 1e6, {"factor": 4.0, "mscale_all_dim": 0.5}),
        (32, 500.0, {"factor": 7.0, "beta_fast": 4.0, "beta_slow": 2.5, "attention_factor": 0.25}),
        (8, 1e4, {"factor": 8.0, "original_max_seq_len": 32}),
        (8, 1e4, {"factor": 8.0, "original_max_seq_len": 4}),  # no pair makes a rotation: a step before the first pair
        (
            8,
            20.0,
            {"factor": 8.0, "original_max_seq_len": 10**9},
        ),  # all pairs make many rotations: the ramp ends after the last pair
        (16, 1e4, {"factor": 1.0}),
        (64, 50_000.0, KIMI_K2 | {"factor": 32.0}),
        (64, 50_000.0, KIMI_K2 | {"factor": 64.0}),
        (64, 50_000.0, KIMI_K2 | {"factor": 64.0, "truncate": False}),
        (64, 10_000.0, {"factor": 4.0, "beta_fast": 2.0, "beta_slow": 2.0}),
        (
            6,
            2.0**3,
            {"factor": 4.0, "beta_fast": 1.0, "truncate": False, "original_max_seq_len": 25},
        ),  # a step on a pair
    ],
)
def test_frequencies_and_attention_factor_equal_transformers(dim: int, theta: float, fields: dict[str, Any]) -> None:
    scaling = Yarn.Config(**fields)
    rope = Rope.Config(dim=dim, theta=theta, scaling=scaling).build()
    hf = LlamaConfig(head_dim=dim, rope_parameters={"rope_theta": theta, **scaling.build().hf_parameters()})
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, "cpu")
    assert torch.equal(rope.frequencies, frequencies)
    assert rope.attention_factor == factor


def test_cosines_and_sines_are_multiplied_by_the_attention_factor() -> None:
    positions = torch.tensor([[0, 5, 100_000]])
    scaled = Rope.Config(dim=64, scaling=Yarn.Config(factor=32, attention_factor=1.25)).build()
    plain = Rope.Config(dim=64, scaling=Yarn.Config(factor=32, attention_factor=1.0)).build()
    for changed, unchanged in zip(scaled(positions, torch.float32), plain(positions, torch.float32), strict=True):
        assert torch.equal(changed, unchanged * 1.25)


def test_the_softmax_factor_is_that_of_deepseek() -> None:
    """m = 0.1 mscale_all_dim ln(factor) + 1, squared."""
    assert Yarn.Config(**DEEPSEEK_V3).build().softmax_factor() == pytest.approx(1.3688879454113937**2)
    assert Yarn.Config(**DEEPSEEK_V2_LITE).build().softmax_factor() == pytest.approx(1.2608037774058553**2)
    assert Yarn.Config(**GPT_OSS).build().softmax_factor() == 1.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("factor", 0.5, "factor must be >= 1, got 0.5"),
        ("beta_fast", 0.5, r"at most beta_fast \(0.5\), got 1.0"),
        ("beta_slow", 0.0, r"beta_slow must be above 0 and at most beta_fast \(32.0\), got 0.0"),
        ("beta_slow", float("nan"), "got nan"),
        ("original_max_seq_len", 0, "original_max_seq_len must be at least 1, got 0"),
        ("mscale", 0.0, "mscale must be > 0 or None, got 0.0"),
        ("mscale_all_dim", -1.0, "mscale_all_dim must be > 0 or None, got -1.0"),
        ("attention_factor", 0.0, "attention_factor must be > 0 or None, got 0.0"),
    ],
)
def test_invalid_scalings_are_rejected_with_a_reason(field: str, value: Any, message: str) -> None:
    config = Yarn.Config(factor=40.0)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        config.build()
