"""Units of losses: token or sequence.

Under context parallel a loss sees one rank's tokens. Terms of tokens add up over ranks; a term of a sequence is the
same on all of them, once the loss has summed over the sequence, and is counted once.
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
"""The ranks that share each sequence while a step runs. (Not of one thread: recomputation runs in others.)"""


def per_token(loss: AnyLoss) -> AnyLoss:
    """State that a loss, a function or a class of losses, is a sum of terms of single tokens, as cross-entropy is.

    Subclasses state their own. Raises TypeError for an object that takes no attributes: decorate its class.
    """
    return _stated(loss, "token")


def per_sequence(loss: AnyLoss) -> AnyLoss:
    """State that a loss, a function or a class of losses, is a sum of terms of whole sequences, as of preferences.

    Such a loss sums what it makes of tokens by `sum_over_sequence`, before anything that is not linear.
    """
    return _stated(loss, "sequence")


def sum_over_sequence(of_own_tokens: Tensor) -> Tensor:
    """Return the sum, over the ranks that share each sequence, of what a loss made of its own tokens; differentiable.

    Any shape and numeric dtype, alike on these ranks. Every one of them calls it, as often as the others. Outside of
    context parallel the tokens are all there, and the tensor is returned as it is.
    """
    if _axis is None:
        return of_own_tokens
    if of_own_tokens.dtype is torch.bool:
        of_own_tokens = of_own_tokens.long()
    return _axis.sum(of_own_tokens, of_gradients=True)


def unit_of(loss: Callable[..., Any]) -> Unit:
    """Return what `loss` states. Raises ValueError where it states nothing."""
    unit: Any = vars(loss).get("loss_unit") if hasattr(loss, "__dict__") else None
    if unit is None and not isinstance(loss, type):  # of its own class: a subclass may sum other terms
        unit = vars(type(loss)).get("loss_unit")
    if unit not in ("token", "sequence"):
        raise ValueError(
            f"Under context_parallel_degree > 1 a loss must state what it is a sum of, got {_name(loss)}, which does "
            "not. Decorate it with titan_parallel.per_token where each token adds a term of its own, or with "
            "titan_parallel.per_sequence, and sum over tokens with titan_parallel.sum_over_sequence."
        )
    return unit


@contextmanager
def sequences_over(axis: Axis) -> Iterator[None]:
    """Let `sum_over_sequence` sum over `axis`."""
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
        if not inspect.ismethod(loss):  # an object with slots, whose `count` a wrapper would hide
            raise TypeError(
                f"A loss that states its unit must take attributes, got {_name(loss)}. Decorate the class of the loss."
            ) from error

        @functools.wraps(loss)
        def stated(*args: Any, **kwargs: Any) -> Any:
            return loss(*args, **kwargs)

        return _stated(stated, unit)
    return loss


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__qualname__", type(loss).__qualname__)
