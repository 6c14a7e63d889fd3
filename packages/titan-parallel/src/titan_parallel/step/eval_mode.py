"""Restore each module's train or eval mode after evaluation.

The file is the same in titan_models and titan_parallel, which do not import each other; a test holds that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode within the context and restore the mode of each module after it, also after an error.

    Modes are set by `train`, parents first, since a module may override it (adapters that are merged for evaluation).
    The flag of a module whose `train` does not set it is restored directly.
    """
    was_training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        model.train(was_training[0][1])
        for module, training in was_training:
            if module.training is not training:
                module.train(training)
        for module, training in was_training:
            module.training = training
