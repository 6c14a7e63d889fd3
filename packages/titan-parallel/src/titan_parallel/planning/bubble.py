"""What follows from the order in which the ranks of a pipeline act: how long they wait, how much is under way."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""What an action takes, in forwards: a whole backward is two, its halves for inputs and for weights one each."""

Action = tuple[str, int, int]
"""(kind, stage, micro-batch)"""


def bubble_of(orders: Mapping[int, Sequence[Any]], num_stages: int) -> float:
    """The share of a step in which a rank waits, where all stages cost the same and sending costs nothing.

    `orders` are torch's actions of each rank; None is a pause.
    """
    waiting = {rank: _actions(order) for rank, order in orders.items()}
    busy = sum(COSTS[kind] for order in waiting.values() for kind, _, _ in order)
    clock = dict.fromkeys(waiting, 0)
    done: dict[Action, int] = {}
    while any(waiting.values()):
        left = sum(map(len, waiting.values()))
        for rank, order in waiting.items():
            while order and (ready := _ready(order[0], done, num_stages)) is not None:
                action = order.pop(0)
                clock[rank] = done[action] = max(clock[rank], ready) + COSTS[action[0]]
        if sum(map(len, waiting.values())) == left:
            raise RuntimeError(f"Got an order of actions in which {waiting} wait for each other for ever.")
    return 1 - busy / (len(clock) * max(clock.values()))


def most_under_way(orders: Mapping[int, Sequence[Any]]) -> list[int]:
    """Of each rank, how many forwards wait for their backwards at most, over all of its stages."""
    most = []
    for _, order in sorted(orders.items()):
        changes = ({"F": 1, "B": -1, "I": -1, "W": 0}[kind] for kind, _, _ in _actions(order))
        most.append(max(itertools.accumulate(changes)))
    return most


def _ready(action: Action, done: Mapping[Action, int], num_stages: int) -> int | None:
    """When what `action` needs is there; None while that is not known."""
    kind, stage, number = action
    if kind == "F":
        return 0 if stage == 0 else done.get(("F", stage - 1, number))
    if kind == "W":
        return done.get(("I", stage, number))
    if stage == num_stages - 1:
        return done.get(("F", stage, number))
    return done.get(("B", stage + 1, number), done.get(("I", stage + 1, number)))


def _actions(order: Sequence[Any]) -> list[Action]:
    """Overlapped actions one by one, without what only sends or frees, and micro-batches by their turn.

    Their own numbers will not do: torch counts the forwards of the last rank of 1F1B from 1.
    """
    turns: Counter[tuple[str, int]] = Counter()
    actions = []
    for step in order:
        for part in (step.sub_actions or (step,)) if step is not None else ():
            kind, stage = part.computation_type.value, part.stage_index
            if kind in COSTS:
                actions.append((kind, stage, turns[kind, stage]))
                turns[kind, stage] += 1
    return actions
