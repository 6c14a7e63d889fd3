"""Numbers that change in the course of a run: the weight of a loss, the rate of a balancing bias."""

from __future__ import annotations

import bisect
from typing import Any

from titan_config import ConfigError, Configurable
from torch import nn

from titan_trainer.errors import nearest


class ScheduledNumber(Configurable):
    """Sets an attribute of the trainer's parts before each step.

    The value follows from the number of the step alone, so that a resumed run goes on with the same values.
    """

    class Config(Configurable.Config):
        attribute: str
        """Its path from the trainer: `loss.weight`, `model.layers.*.feed_forward.router.balancing.rate`; `*` stands for
        all modules in one."""
        points: list[tuple[int, float]]
        """Steps, from 0, and values; between two steps linear, constant before the first and after the last. Two points
        at one step are a jump."""

        def validate(self) -> None:
            steps = [step for step, _ in self.points]
            if not steps or steps != sorted(steps) or steps[0] < 0:
                raise ConfigError(
                    f"points must be one or more in the order of their steps, from 0, got steps {steps}.", "points"
                )

    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps = [step for step, _ in config.points]

    def value(self, step: int) -> float:
        """Return the value for the update number `step`, counted from 0."""
        points, after = self.config.points, bisect.bisect_right(self._steps, step)
        if after == 0 or after == len(points):
            return points[max(after - 1, 0)][1]
        (first, start), (last, end) = points[after - 1], points[after]
        return start + (end - start) * (step - first) / (last - first)

    def owners(self, trainer: Any) -> list[Any]:
        """Return the objects that have the attribute. Raises ConfigError for a path that leads to no number."""
        *path, name = self.config.attribute.split(".")
        owners, reached = [trainer], "trainer"
        for part in path:
            owners = [child for owner in owners for child in _children(owner, part, reached)]
            reached = f"{reached}.{part}"
        odd = [owner for owner in owners if not _is_number(getattr(owner, name, None))]
        if odd or not owners:
            known = [key for owner in odd[:1] for key, value in _attributes(owner).items() if _is_number(value)]
            raise ConfigError(
                f"scheduled.attribute must lead to a number, got {self.config.attribute!r}: {reached} has no number "
                f"{name!r}.{_hint(name, known)}"
            )
        return owners

    def apply(self, owners: list[Any], step: int) -> None:
        """Set the attribute of `owners` to the value of a step."""
        for owner in owners:
            setattr(owner, self.config.attribute.rpartition(".")[2], self.value(step))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _children(owner: Any, name: str, reached: str) -> list[Any]:
    """The parts of `owner` of that name; none where `reached` is of several, which need not be alike."""
    if name == "*" and isinstance(owner, nn.Module):
        return list(owner.children())
    child = getattr(owner, name, None)
    if child is None and "*" not in reached:
        known = [key for key in {**_attributes(owner), **getattr(owner, "_modules", {})} if not key.startswith("_")]
        raise ConfigError(
            f"scheduled.attribute must lead to a number, got {reached} without {name!r}.{_hint(name, known)}"
        )
    return [] if child is None else [child]


def _attributes(owner: Any) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _hint(name: str, known: list[str]) -> str:
    return f" Did you mean {nearest(name, known)}?" if known else ""
