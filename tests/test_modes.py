"""One file in two packages that do not import each other."""

from __future__ import annotations

import inspect

from titan_models.training import eval_mode as modes
from titan_parallel.step import eval_mode as modes_of_parallel


def test_titan_models_and_titan_parallel_restore_modes_by_the_same_code():
    assert inspect.getsource(modes) == inspect.getsource(modes_of_parallel)
