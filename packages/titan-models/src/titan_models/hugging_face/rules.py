"""Rules by which a model's weights are found in Hugging Face's files: patterns of names, and steps of layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from titan_models.hugging_face.pieces import Piece
from titan_models.hugging_face.steps import Step


@dataclass(frozen=True)
class Stored:
    """Where Hugging Face's files hold weights: under `name`, after `steps`, in that order.

    >>> Stored("model.layers.*.mlp.experts.gate_up_proj", Halves(dim=-2), Transposed())  # doctest: +SKIP
    """

    name: str
    steps: tuple[Step, ...]

    def __init__(self, name: str, *steps: Step) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "steps", steps)


Rules = dict[str | tuple[str, ...], str | Stored]
"""`{own pattern: Hugging Face's}`, or `{(own patterns): Stored(...)}` for weights that are one tensor there."""


def pieces_of(shapes: Mapping[str, tuple[int, ...]], rules: Rules) -> list[Piece]:
    """What becomes of each weight.

    Raises ValueError unless weights have one rule each, rules a weight, and no two pieces the same name.
    """
    groups = [((own,) if isinstance(own, str) else own, _stored(stored)) for own, stored in rules.items()]
    pieces: list[Piece] = []
    used = set()
    for name in shapes:
        group, stored, match = _rule_for(name, groups)
        used.add(group)
        names = tuple(_filled(pattern, match) for pattern in group)
        if absent := [other for other in names if other not in shapes]:
            raise ValueError(
                f"Got a rule for {name} together with {listed(absent)}, which the model does not have. Weights that "
                "are one tensor there are all there. Correct the rule."
            )
        if name == names[0]:
            pieces += _pieces(names, _filled(stored.name, match), stored.steps, shapes)
    if unused := sorted(", ".join(group) for group, _ in groups if group not in used):
        raise ValueError(f"Got rules that fit no parameter: {listed(unused)}. A rule renames something. Remove them.")
    counts = Counter(piece.hf_name for piece in pieces)
    if met := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"Got two parameters for {listed(met)}. Names map one to one. Correct the rules.")
    return pieces


def _rule_for(name: str, groups: list[tuple[tuple[str, ...], Stored]]) -> tuple[tuple[str, ...], Stored, re.Match[str]]:
    fitting = [
        (group, stored, match)
        for group, stored in groups
        for pattern in group
        if (match := re.fullmatch(_expression(pattern), name))
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"Got {len(fitting)} rules for the parameter {name}. Each parameter has one place in Hugging Face's "
            "checkpoint. Give it one rule."
        )
    return fitting[0]


def _pieces(
    names: tuple[str, ...], hf_name: str, steps: tuple[Step, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Piece]:
    if "#" not in hf_name:
        yield Piece(tuple((name, None) for name in names), (hf_name,), steps)
        return
    for index in range(shapes[names[0]][0]):
        yield Piece(tuple((name, index) for name in names), (hf_name.replace("#", str(index)),), steps)


def _stored(stored: str | Stored) -> Stored:
    return Stored(stored) if isinstance(stored, str) else stored


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"([^.]+)")


def _filled(pattern: str, match: re.Match[str]) -> str:
    """A pattern with its `*` replaced by what those of another one met."""
    first, *parts = pattern.split("*")
    return first + "".join(star + part for star, part in zip(match.groups(), parts, strict=False))


def listed(names: list[str]) -> str:
    """Names for an error that fits on a screen."""
    shown = ", ".join(names[:8]) or "nothing"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
