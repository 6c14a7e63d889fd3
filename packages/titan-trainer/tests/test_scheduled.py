"""Numbers that change during a run."""

import functools
from types import SimpleNamespace

import pytest
from titan_config import ConfigError
from titan_trainer import CrossEntropy, ScheduledNumber
from torch import nn


def test_values_are_linear_between_points_and_constant_outside_of_them():
    number = ScheduledNumber.Config(attribute="loss.weight", points=[(2, 1.0), (4, 2.0), (6, 2.0), (6, 0.5)]).build()
    assert [number.value(step) for step in range(9)] == [1, 1, 1, 1.5, 2, 2, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("points", [[], [(5, 0.1), (4, 0.2)], [(-1, 0.1)]])
def test_unsorted_or_missing_points_are_rejected(points):
    with pytest.raises(ConfigError, match="points must not be empty and have ascending steps of at least 0, got"):
        ScheduledNumber.Config(attribute="loss.weight", points=points).build()


class Router(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate


def trainer_of_layers():
    layers = nn.ModuleList([nn.Identity(), nn.Sequential(Router(0.1)), nn.Sequential(Router(0.2))])
    model = nn.Module()
    model.layers = layers
    return SimpleNamespace(model=model, loss=SimpleNamespace(weight=0.3, is_on=True))


def test_a_path_with_a_star_sets_the_attribute_of_all_layers_that_have_it():
    trainer = trainer_of_layers()
    number = ScheduledNumber.Config(attribute="model.layers.*.0.rate", points=[(0, 0.5), (2, 0.0)]).build()
    number.apply(number.owners(trainer), 1)
    assert [layer[0].rate for layer in trainer.model.layers[1:]] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("loss.wieght", "got 'loss.wieght': trainer.loss has no numeric attribute 'wieght'. Did you mean 'weight'"),
        ("lss.weight", "got 'lss.weight': trainer has no attribute 'lss'. Did you mean 'loss'"),
        ("loss.weight.x", "must be the path of a number, got 'loss.weight.x'"),
        ("loss.weight.x.y", "got 'loss.weight.x.y': trainer.loss.weight has no attribute 'x'"),
        ("loss.is_on", "must be the path of a number, got 'loss.is_on'"),
        ("model.layers.*.1.rate", "must be the path of a number, got 'model.layers.*.1.rate'"),
        ("model.layer.*.rate", "trainer.model has no attribute 'layer'. Did you mean 'layers'"),
    ],
)
def test_a_path_that_does_not_lead_to_a_number_is_rejected(attribute, message):
    number = ScheduledNumber.Config(attribute=attribute, points=[(0, 1.0)]).build()
    with pytest.raises(ConfigError) as caught:
        number.owners(trainer_of_layers())
    assert message in str(caught.value)


def train_and_record(train_step, trainer, values):
    result = train_step()
    values.append(trainer.loss.z_loss)
    return result


def test_a_resumed_run_has_the_scheduled_value_of_each_step(run_ranks, toy_config, toy):
    number = ScheduledNumber.Config(attribute="loss.z_loss", points=[(0, 0.0), (8, 0.8)])

    def train():
        values = []
        for steps in (4, 10):
            config = toy_config(loss=CrossEntropy.Config(), scheduled=[number], checkpoint=toy.Checkpointer.Config())
            config.training.steps = steps
            trainer = config.build()
            trainer.train_step = functools.partial(train_and_record, trainer.train_step, trainer, values)
            trainer.train()
        return values

    (values,) = run_ranks(1, train)
    assert values == pytest.approx([0.1 * step for step in range(8)] + [0.8, 0.8])
