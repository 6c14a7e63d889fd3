"""Numbers that change during a run: the weight of a loss, the update rate of a balancing bias."""

from __future__ import annotations

import bisect
from typing import Any

from titan_config import ConfigError, Configurable
from torch import nn

from titan_trainer.errors import nearest


class ScheduledNumber(Configurable):
    """A schedule that sets an attribute of the trainer, its loss or its model before each step.

    The value depends on the step number alone, so that a resumed run continues with the same values.
    """

    class Config(Configurable.Config):
        attribute: str
        """Path of the attribute from the trainer: `loss.weight`, `model.layers.*.feed_forward.router.balancing.rate`;
        `*` matches all children of a module."""
        points: list[tuple[int, float]]
        """(step, value) pairs, with steps counted from 0: linear between two steps, constant before the first and after
        the last. Two points at the same step make a jump."""

        def validate(self) -> None:
            steps = [step for step, _ in self.points]
            if not steps or steps != sorted(steps) or steps[0] < 0:
                raise ConfigError(
                    f"points must not be empty and have ascending steps of at least 0, got steps {steps}.", "points"
                )

    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps = [step for step, _ in config.points]

    def value(self, step: int) -> float:
        """Return the value for step number `step`, counted from 0."""
        points, after = self.config.points, bisect.bisect_right(self._steps, step)
        if after == 0 or after == len(points):
            return points[max(after - 1, 0)][1]
        (first, start), (last, end) = points[after - 1], points[after]
        return start + (end - start) * (step - first) / (last - first)

    def owners(self, trainer: Any) -> list[Any]:
        """Return the objects that have the attribute. Raises ConfigError if the path does not lead to a number."""
        *path, name = self.config.attribute.split(".")
        owners, prefix = [trainer], "trainer"
        for child_name in path:
            owners = [child for owner in owners for child in self._children(owner, child_name, prefix)]
            prefix = f"{prefix}.{child_name}"
        invalid = [owner for owner in owners if not _is_number(getattr(owner, name, None))]
        if invalid or not owners:
            known = [key for owner in invalid[:1] for key, value in _attributes(owner).items() if _is_number(value)]
            raise self._error(f"{prefix} has no numeric attribute {name!r}.", name, known)
        return owners

    def apply(self, owners: list[Any], step: int) -> None:
        """Set the attribute of `owners` to the value of a step."""
        for owner in owners:
            setattr(owner, self.config.attribute.rpartition(".")[2], self.value(step))

    def _children(self, owner: Any, name: str, prefix: str) -> list[Any]:
        """Return the children of `owner` of that name; owners matched by a `*` in `prefix` may have none."""
        if name == "*" and isinstance(owner, nn.Module):
            return list(owner.children())
        child = getattr(owner, name, None)
        if child is None and "*" not in prefix:
            known = [key for key in {**_attributes(owner), **getattr(owner, "_modules", {})} if not key.startswith("_")]
            raise self._error(f"{prefix} has no attribute {name!r}.", name, known)
        return [] if child is None else [child]

    def _error(self, reason: str, name: str, known: list[str]) -> ConfigError:
        suggestion = f" Did you mean {nearest(name, known)}?" if known else ""
        return ConfigError(
            f"scheduled.attribute must be the path of a number, got {self.config.attribute!r}: {reason}{suggestion}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _attributes(owner: Any) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})
