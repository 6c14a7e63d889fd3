import re

import pytest
import torch
from titan_config import ConfigError
from titan_trainer import AdamW, ParameterGroup
from torch import nn


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double()
    return model


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def reference_adamw(weights, gradients, *, lr, beta1, beta2, eps, weight_decay):
    """Yield the weights of each step by algorithm 2 of arXiv:1711.05101, with lr * weight_decay as in torch."""
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        weights = weights - lr * weight_decay * weights
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        weights = weights - lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        yield weights


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_every_implementation_matches_the_paper(implementation):
    model = small_model()
    weight = model[0].weight
    config = AdamW.Config(lr=1e-2, weight_decay=0.1, implementation=implementation)
    optimizer = config.build(parameters=model.named_parameters())
    gradients, before = [], weight.detach().clone()
    for step in range(3):
        set_gradients(model, step)
        gradients.append(weight.grad.clone())
        optimizer.step(lr_factor=1.0)
    expected = list(reference_adamw(before, gradients, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1))[-1]
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_a_parameter_has_the_settings_of_the_first_group_that_matches():
    groups = [ParameterGroup(pattern="*bias", weight_decay=0.0), ParameterGroup(pattern="2.*", lr_factor=0.5)]
    optimizer = AdamW.Config(lr=1.0, weight_decay=0.1, parameter_groups=groups).build(
        parameters=small_model().named_parameters()
    )
    actual = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.optimizer.param_groups]
    assert actual == [(3, 1.0, 0.0), (1, 0.5, 0.1), (2, 1.0, 0.1)]


def test_a_pattern_may_match_nonlocal_parameters_only():
    groups = [ParameterGroup(pattern="*norm*", weight_decay=0.0), ParameterGroup(pattern="2.*", lr_factor=0.5)]
    optimizer = AdamW.Config(lr=1.0, parameter_groups=groups).build(
        parameters=small_model().named_parameters(), nonlocal_parameters=["norm.weight"]
    )
    assert [(len(g["params"]), g["lr"]) for g in optimizer.optimizer.param_groups] == [(2, 0.5), (4, 1.0)]
    again = [*groups, ParameterGroup(pattern="norm.weight")]
    with pytest.raises(ConfigError, match=r"that no earlier group matches, got pattern 'norm\.weight'"):
        AdamW.Config(parameter_groups=again).build(
            parameters=small_model().named_parameters(), nonlocal_parameters=["norm.weight"]
        )


def test_a_pattern_without_a_match_is_rejected_with_the_closest_name():
    config = AdamW.Config(parameter_groups=[ParameterGroup(pattern="0.wieght")])
    with pytest.raises(ConfigError, match=r"got pattern '0\.wieght'\. The closest name is '0\.weight'"):
        config.build(parameters=small_model().named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, "optimizer.lr must be finite and at least 0, got nan."),
        ({"lr": float("inf")}, "optimizer.lr must be finite and at least 0, got inf."),
        ({"weight_decay": -1.0}, "optimizer.weight_decay must be finite and at least 0, got -1.0."),
        ({"eps": -1.0}, "optimizer.eps must be finite and at least 0, got -1.0."),
        ({"beta1": 1.5}, "optimizer.beta1 must be at least 0 and below 1, got 1.5."),
        ({"beta2": 1.0}, "optimizer.beta2 must be at least 0 and below 1, got 1.0."),
        ({"lr": -1.0}, "optimizer.lr must be finite and at least 0, got -1.0."),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdamW.Config(**settings).build(parameters=small_model().named_parameters())


@pytest.mark.parametrize("settings", [{"lr_factor": float("nan")}, {"weight_decay": -0.1}])
def test_invalid_settings_of_a_parameter_group_are_rejected(settings):
    with pytest.raises(ConfigError, match=f"parameter_groups.{next(iter(settings))} must be finite"):
        AdamW.Config(parameter_groups=[ParameterGroup(pattern="*", **settings)]).build(
            parameters=small_model().named_parameters()
        )


def test_frozen_parameters_are_not_updated_and_have_no_state():
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = AdamW.Config(lr=1e-2).build(parameters=model.named_parameters())
    before = model[0].weight.clone()
    set_gradients(model, 0)
    optimizer.step(lr_factor=1.0)
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in optimizer.state_dict()


@pytest.mark.parametrize("implementation", ["for-loop", "fused"])
def test_an_optimizer_with_loaded_state_continues_bitwise_equal(implementation):
    first, second = small_model(), small_model()
    config = AdamW.Config(lr=1e-2, implementation=implementation)
    optimizers = [config.build(parameters=model.named_parameters()) for model in (first, second)]
    for step in range(2):
        set_gradients(first, step)
        optimizers[0].step(lr_factor=1.0)
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip((first, second), optimizers, strict=True):
        set_gradients(model, 2)
        optimizer.step(lr_factor=0.5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
