import math

import pytest
from titan_config import ConfigError
from titan_trainer import WarmupStableDecay


def factors(training_steps: int = 20, **settings) -> list[float]:
    schedule = WarmupStableDecay.Config(**settings).build(training_steps=training_steps)
    return [schedule.factor(step) for step in range(training_steps)]


def test_warmup_is_linear_and_its_first_factor_is_above_zero():
    assert factors(warmup_steps=4)[:5] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1])


def test_without_a_decay_ratio_all_steps_after_the_warmup_decay():
    assert factors(warmup_steps=0, training_steps=4) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])


def test_with_a_decay_ratio_the_factor_is_one_until_the_decay():
    values = factors(warmup_steps=2, decay_ratio=0.25)
    assert values[2:15] == [1.0] * 13
    assert values[15:] == pytest.approx([1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])


@pytest.mark.parametrize(
    ("decay_type", "expected"),
    [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)],
)
def test_factor_half_way_through_the_decay(decay_type, expected):
    assert factors(warmup_steps=0, decay_type=decay_type)[10] == pytest.approx(expected)


def test_cosine_decay_matches_the_formula():
    expected = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert factors(warmup_steps=0, decay_type="cosine") == pytest.approx(expected)


def test_decay_ends_at_min_lr_factor_and_stays_there():
    schedule = WarmupStableDecay.Config(warmup_steps=0, total_steps=10, min_lr_factor=0.1).build(training_steps=20)
    assert schedule.factor(5) == pytest.approx(0.55)
    assert [schedule.factor(step) for step in (10, 15)] == pytest.approx([0.1, 0.1])


def test_total_steps_keeps_the_schedule_when_training_steps_grows():
    short = WarmupStableDecay.Config(warmup_steps=2, total_steps=20).build(training_steps=7)
    long = WarmupStableDecay.Config(warmup_steps=2, total_steps=20).build(training_steps=20)
    assert [short.factor(step) for step in range(7)] == [long.factor(step) for step in range(7)]


@pytest.mark.parametrize(
    "settings", [{"warmup_steps": -1}, {"total_steps": 0}, {"decay_ratio": 1.5}, {"min_lr_factor": -0.1}]
)
def test_invalid_settings_are_rejected(settings):
    with pytest.raises(ConfigError, match=rf"lr_scheduler\.{next(iter(settings))} must be"):
        WarmupStableDecay.Config(**settings).build(training_steps=10)
