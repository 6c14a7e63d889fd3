"""Properties of a pipeline schedule: the bubble, and the number of in-flight micro-batches of each rank."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""The time of an action, in forwards: a whole backward is two, its halves for inputs and for weights one each."""

Action = tuple[str, int, int]
"""(kind, stage, micro-batch)"""


def bubble_of(orders: Mapping[int, Sequence[Any]], num_stages: int) -> float:
    """Return the fraction of a step in which ranks are idle, if all stages cost the same and sending costs nothing.

    `orders` are torch's actions of each rank; None is a pause. Raises RuntimeError for a schedule that deadlocks.
    """
    remaining = {rank: _actions(order) for rank, order in orders.items()}
    busy = sum(COSTS[kind] for order in remaining.values() for kind, _, _ in order)
    clock = dict.fromkeys(remaining, 0)
    done: dict[Action, int] = {}
    while any(remaining.values()):
        num_before = sum(map(len, remaining.values()))
        for rank, order in remaining.items():
            while order and (ready := _ready(order[0], done, num_stages)) is not None:
                action = order.pop(0)
                clock[rank] = done[action] = max(clock[rank], ready) + COSTS[action[0]]
        if sum(map(len, remaining.values())) == num_before:
            raise RuntimeError(
                f"The pipeline schedule must not deadlock, got ranks that wait for each other: {remaining}."
            )
    return 1 - busy / (len(clock) * max(clock.values()))


def max_in_flight(orders: Mapping[int, Sequence[Any]]) -> list[int]:
    """Return, for each rank, the largest number of forwards that wait for their backwards, summed over its stages."""
    most = []
    for _, order in sorted(orders.items()):
        changes = ({"F": 1, "B": -1, "I": -1, "W": 0}[kind] for kind, _, _ in _actions(order))
        most.append(max(itertools.accumulate(changes)))
    return most


def _ready(action: Action, done: Mapping[Action, int], num_stages: int) -> int | None:
    """Return the time at which the inputs of `action` are available; None while it is not known."""
    kind, stage, number = action
    if kind == "F":
        return 0 if stage == 0 else done.get(("F", stage - 1, number))
    if kind == "W":
        return done.get(("I", stage, number))
    if stage == num_stages - 1:
        return done.get(("F", stage, number))
    return done.get(("B", stage + 1, number), done.get(("I", stage + 1, number)))


def _actions(order: Sequence[Any]) -> list[Action]:
    """Return the computations in order, with overlapped ones one by one; sends, receives and frees are dropped.

    Micro-batches are numbered by their occurrence, as torch counts the forwards of the last rank of 1F1B from 1.
    """
    counts: Counter[tuple[str, int]] = Counter()
    actions = []
    for step in order:
        for action in (step.sub_actions or (step,)) if step is not None else ():
            kind, stage = action.computation_type.value, action.stage_index
            if kind in COSTS:
                actions.append((kind, stage, counts[kind, stage]))
                counts[kind, stage] += 1
    return actions
