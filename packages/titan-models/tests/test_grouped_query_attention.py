"""Rotation, temperature and QK norm of grouped-query attention, compared with their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import GroupedQueryAttention, Mask, RMSNorm, Rope, RotaryPositions, Temperature, init_weights
from torch import Tensor

DIM, HEADS, FEATURES, LENGTH = 24, 4, 6, 20
ROPE = Rope.Config(dim=FEATURES, theta=100.0).build()


def hidden_states() -> Tensor:
    return torch.randn(2, LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attend(positions: Tensor, **config: Any) -> tuple[GroupedQueryAttention, Tensor]:
    attention = GroupedQueryAttention.Config(num_heads=HEADS, num_kv_heads=2, head_dim=FEATURES, **config)
    module = attention.build(dim=DIM)
    init_weights(module, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(20)
    module.double()
    rotary = RotaryPositions(positions, *ROPE(positions, torch.float64))
    return module, module(hidden_states(), rotary, module.core.build_mask(Mask.causal(positions)))


def by_formula(module: GroupedQueryAttention, turn: Any) -> Tensor:
    """Return the output computed head by head, with `turn(q or k, is_query)` applied to `[B, T, K]`."""
    x, heads = hidden_states(), []
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    for head in range(HEADS):
        own, shared = slice(head * FEATURES, (head + 1) * FEATURES), head // 2
        of_group = slice(shared * FEATURES, (shared + 1) * FEATURES)
        scores = turn(q[..., own], True) @ turn(k[..., of_group], False).transpose(1, 2) / FEATURES**0.5
        hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
        heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., of_group])
    return module.o_proj(torch.cat(heads, -1))


POSITIONS = torch.arange(LENGTH).expand(2, LENGTH) + torch.tensor([[0], [7]])


def rotated_as_complex_numbers(x: Tensor, halves: bool) -> Tensor:
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.unflatten(-1, (-1, 2))
    angles = POSITIONS[..., None] * ROPE.frequencies.double()
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_real(turned)
    return (pairs.transpose(-1, -2) if halves else pairs).flatten(-2)


@pytest.mark.parametrize("rotation", ["halves", "neighbors"])
def test_feature_pairs_rotate_as_complex_numbers(rotation: str) -> None:
    module, output = attend(POSITIONS, rotation=rotation)
    halves = rotation == "halves"
    expected = by_formula(module, lambda x, is_query: rotated_as_complex_numbers(x, halves))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    other = by_formula(module, lambda x, is_query: rotated_as_complex_numbers(x, not halves))
    assert (output - other).abs().max() > 1e-2


def test_without_rotation_positions_change_nothing() -> None:
    module, output = attend(POSITIONS, rotation=None)
    torch.testing.assert_close(output, by_formula(module, lambda x, is_query: x), rtol=0, atol=1e-12)
    assert torch.equal(output, attend(POSITIONS * 3, rotation=None)[1])


def test_a_temperature_scales_queries_by_their_positions() -> None:
    module, output = attend(POSITIONS, rotation=None, temperature=Temperature.Config(step=8, strength=0.5))
    scales = 1 + 0.5 * torch.log(1 + torch.floor((POSITIONS.double() + 1) / 8))
    assert scales[0, 6] == 1 < scales[0, 7]  # the eighth token is the first with a scale above 1
    expected = by_formula(module, lambda x, is_query: x * scales[..., None] if is_query else x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_a_norm_without_a_weight_commutes_with_the_rotation() -> None:
    """Therefore Llama 4 may apply it before the rotation, unlike transformers."""
    module, output = attend(POSITIONS, rotation="neighbors", qk_norm=RMSNorm.Config(eps=1e-2, weight_init=None))
    assert [name for name, _ in module.named_parameters() if "norm" in name] == []

    def turn_then_norm(x: Tensor, is_query: bool) -> Tensor:
        x = rotated_as_complex_numbers(x, halves=False)
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()

    torch.testing.assert_close(output, by_formula(module, turn_then_norm), rtol=0, atol=1e-12)


def test_invalid_temperatures_are_rejected() -> None:
    for values, message in [
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"strength": 0.0}, "strength must be > 0, got 0.0.*temperature to None"),
    ]:
        with pytest.raises(ValueError, match=message):
            Temperature.Config(**values).build()
