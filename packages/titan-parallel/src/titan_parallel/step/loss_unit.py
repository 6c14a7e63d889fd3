"""Units of losses: token or sequence.

Under context parallel a loss sees the tokens of one rank. Terms of single tokens are summed over the ranks. A term of
a whole sequence is the same on all ranks that share the sequence, once the loss has called `sum_over_sequence`; it is
counted once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from titan_parallel.mesh.collectives import Axis

Unit = Literal["token", "sequence"]
AnyLoss = TypeVar("AnyLoss", bound=Callable[..., Any])

_axis: Axis | None = None
"""The ranks that share each sequence, while a step runs. Not thread-local: recomputation runs in other threads."""


def per_token(loss: AnyLoss) -> AnyLoss:
    """Declare that a loss (a function or class) is a sum of terms of single tokens, such as cross-entropy.

    Subclasses do not inherit the declaration. Raises TypeError for an object without settable attributes; decorate its
    class instead.
    """
    return _stated(loss, "token")


def per_sequence(loss: AnyLoss) -> AnyLoss:
    """Declare that a loss (a function or class) is a sum of terms of whole sequences, such as a preference loss.

    The loss must call `sum_over_sequence` on per-token values before any nonlinear operation. Subclasses do not inherit
    the declaration. Raises TypeError for an object without settable attributes; decorate its class instead.
    """
    return _stated(loss, "sequence")


def sum_over_sequence(of_own_tokens: Tensor) -> Tensor:
    """Return the differentiable sum of a tensor over the ranks that share each sequence.

    `of_own_tokens` is computed from the tokens of this rank, in any shape and numeric or bool dtype, the same on these
    ranks; bool is summed as int64. Collective: these ranks must call it equally often. Without context parallel a rank
    has all tokens, and the tensor is returned unchanged.
    """
    if _axis is None:
        return of_own_tokens
    if of_own_tokens.dtype is torch.bool:
        of_own_tokens = of_own_tokens.long()
    return _axis.sum(of_own_tokens, of_gradients=True)


def unit_of(loss: Callable[..., Any]) -> Unit:
    """Return the unit that `loss` declares. Raises ValueError if it declares none."""
    unit: Any = vars(loss).get("loss_unit") if hasattr(loss, "__dict__") else None
    if unit is None and not isinstance(loss, type):  # not inherited: a subclass may sum other terms
        unit = vars(type(loss)).get("loss_unit")
    if unit not in ("token", "sequence"):
        raise ValueError(
            f"A loss must declare its unit for context_parallel_degree > 1, got {_name(loss)} without a unit. Decorate "
            "it with titan_parallel.per_token if it is a sum of independent terms of tokens, else with "
            "titan_parallel.per_sequence, and sum over tokens with titan_parallel.sum_over_sequence."
        )
    return unit


@contextmanager
def sequences_over(axis: Axis) -> Iterator[None]:
    """Set the axis of `sum_over_sequence` inside the context."""
    global _axis
    before, _axis = _axis, axis
    try:
        yield
    finally:
        _axis = before


def _stated(loss: Any, unit: Unit) -> Any:
    try:
        loss.loss_unit = unit
    except AttributeError as error:
        if not inspect.ismethod(loss):  # an object with slots: a wrapper would hide its `count`
            raise TypeError(
                f"A loss must have settable attributes to declare its unit, got {_name(loss)}. Decorate its class."
            ) from error

        @functools.wraps(loss)
        def stated(*args: Any, **kwargs: Any) -> Any:
            return loss(*args, **kwargs)

        return _stated(stated, unit)
    return loss


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__qualname__", type(loss).__qualname__)
