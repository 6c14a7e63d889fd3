"""Evaluation changes no mode: a part that was in eval mode, such as a frozen encoder, is in it afterwards."""

from __future__ import annotations

import pytest
from titan_parallel.step.eval_mode import in_eval_mode
from torch import nn


def raises(head, hidden, targets):
    raise KeyError("raised")


def test_evaluate_leaves_each_module_in_its_own_mode_also_after_an_error(run_ranks, small):
    def modes(mesh):
        model = small.make_model()
        parallel = small.put_on(mesh, model)
        model.norm.eval()
        batches = small.micro_batches(small.make_batch(), parallel.dims, 2)
        found = [[module.training for module in model.modules()]]
        parallel.evaluate(batches, small.chunked_loss)
        found.append([module.training for module in model.modules()])
        with pytest.raises(KeyError):
            parallel.evaluate(batches, raises)
        found.append([module.training for module in model.modules()])
        return found

    for before, after, after_error in [*run_ranks(1, modes, "one"), *run_ranks(2, modes, "fsdp2")]:
        assert before == after == after_error
        assert set(before) == {True, False}


class Merged(nn.Linear):
    """Merges what it has beside its weight while it evaluates, as adapters do."""

    merged = False

    def train(self, mode: bool = True):
        self.merged = not mode
        return super().train(mode)


class Frozen(nn.Linear):
    """Obeys nobody."""

    def train(self, mode: bool = True):
        return self


def test_a_module_that_acts_on_its_mode_is_told_its_own_again():
    model = nn.Sequential(Merged(1, 1), nn.Sequential(Merged(1, 1)), Frozen(1, 1))
    model[1].eval()
    model[2].training = False
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, False, False, False]
    assert (model[0].merged, model[1][0].merged) == (False, True)
