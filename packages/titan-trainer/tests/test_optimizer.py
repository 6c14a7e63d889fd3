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


def adamw_by_the_paper(weights, gradients, *, lr, beta1, beta2, eps, weight_decay):
    """Algorithm 2 of arXiv:1711.05101, the decay times the learning rate as in torch; the weights of each step."""
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        weights = weights - lr * weight_decay * weights
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        weights = weights - lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        yield weights


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_every_implementation_follows_the_paper(implementation):
    model = small_model()
    weight = model[0].weight
    config = AdamW.Config(lr=1e-2, weight_decay=0.1, implementation=implementation)
    optimizer = config.build(parameters=model.named_parameters())
    expected_steps, before = [], weight.detach().clone()
    for step in range(3):
        set_gradients(model, step)
        expected_steps.append(weight.grad.clone())
        optimizer.step(lr_factor=1.0)
    expected = list(
        adamw_by_the_paper(before, expected_steps, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    )[-1]
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_groups_by_pattern_change_learning_rate_and_decay_first_match_first():
    groups = [ParameterGroup(pattern="*bias", weight_decay=0.0), ParameterGroup(pattern="2.*", lr_factor=0.5)]
    optimizer = AdamW.Config(lr=1.0, weight_decay=0.1, parameter_groups=groups).build(
        parameters=small_model().named_parameters()
    )
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.optimizer.param_groups]
    assert found == [(3, 1.0, 0.0), (1, 0.5, 0.1), (2, 1.0, 0.1)]


def test_a_pattern_may_be_about_parameters_of_other_ranks_alone():
    groups = [ParameterGroup(pattern="*norm*", weight_decay=0.0), ParameterGroup(pattern="2.*", lr_factor=0.5)]
    optimizer = AdamW.Config(lr=1.0, parameter_groups=groups).build(
        parameters=small_model().named_parameters(), nonlocal_parameters=["norm.weight"]
    )
    assert [(len(g["params"]), g["lr"]) for g in optimizer.optimizer.param_groups] == [(2, 0.5), (4, 1.0)]
    again = [*groups, ParameterGroup(pattern="norm.weight")]
    with pytest.raises(ConfigError, match=r"norm\.weight.*no earlier group took"):
        AdamW.Config(parameter_groups=again).build(
            parameters=small_model().named_parameters(), nonlocal_parameters=["norm.weight"]
        )


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    config = AdamW.Config(parameter_groups=[ParameterGroup(pattern="0.wieght")])
    with pytest.raises(ConfigError, match=r"0\.wieght.*'0\.weight'"):
        config.build(parameters=small_model().named_parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": float("nan")}, "Got lr nan"),
        ({"lr": float("inf")}, "Got lr inf"),
        ({"weight_decay": -1.0}, "Got weight_decay -1.0"),
        ({"eps": -1.0}, "Got eps -1.0"),
        ({"beta1": 1.5}, "Got beta1 1.5"),
        ({"beta2": 1.0}, "Got beta2 1.0"),
        ({"lr": -1.0}, "Got lr -1.0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        AdamW.Config(**settings).build(parameters=small_model().named_parameters())


@pytest.mark.parametrize("settings", [{"lr_factor": float("nan")}, {"weight_decay": -0.1}])
def test_a_group_with_settings_without_meaning_is_refused(settings):
    with pytest.raises(ConfigError, match=f"parameter_groups.{next(iter(settings))}"):
        AdamW.Config(parameter_groups=[ParameterGroup(pattern="*", **settings)]).build(
            parameters=small_model().named_parameters()
        )


def test_frozen_parameters_are_left_alone():
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = AdamW.Config(lr=1e-2).build(parameters=model.named_parameters())
    before = model[0].weight.clone()
    set_gradients(model, 0)
    optimizer.step(lr_factor=1.0)
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in optimizer.state_dict()


@pytest.mark.parametrize("implementation", ["for-loop", "fused"])
def test_state_goes_into_another_optimizer_and_both_go_on_alike(implementation):
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
