"""The schedules of recipes lead to what there is."""

from __future__ import annotations

from types import SimpleNamespace

import torch


def test_deepseek_v3_weighs_the_second_token_less_in_the_end_and_stops_balancing(recipe):
    config = recipe("deepseek_v3_671b").deepseek_v3_671b()
    config.model.num_layers = 6
    with torch.device("meta"):
        trainer = SimpleNamespace(model=config.model.build(), loss=config.loss.build())
    weight, rate = (each.build() for each in config.scheduled)
    assert weight.owners(trainer) == [trainer.loss]
    assert len(rate.owners(trainer)) == 4  # three layers are dense, and there is the block that looks ahead
    last = config.training.steps - 1
    assert [weight.value(step) for step in (0, last // 2, last)] == [0.3, 0.3, 0.1]
    assert [rate.value(step) for step in (0, last // 2, last)] == [1e-3, 1e-3, 0.0]
