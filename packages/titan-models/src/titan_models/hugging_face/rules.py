"""Rules by which a model's weights are found in Hugging Face's files: patterns of names, and transforms of layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from titan_models.hugging_face.layout_transforms import LayoutTransform
from titan_models.hugging_face.weight_mapping import WeightMapping


@dataclass(frozen=True)
class HfTensor:
    """Where Hugging Face's files hold weights: under `name`, after `transforms`, in that order.

    >>> HfTensor("model.layers.*.mlp.experts.gate_up_proj", Halves(dim=-2), Transposed())  # doctest: +SKIP
    """

    name: str
    transforms: tuple[LayoutTransform, ...]

    def __init__(self, name: str, *transforms: LayoutTransform) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "transforms", transforms)


Rules = dict[str | tuple[str, ...], str | HfTensor]
"""`{own pattern: Hugging Face's}`, or `{(own patterns): HfTensor(...)}` for weights that are one tensor there."""


def mappings_of(shapes: Mapping[str, tuple[int, ...]], rules: Rules) -> list[WeightMapping]:
    """What becomes of each weight.

    Raises ValueError unless weights have one rule each, rules a weight, and no two mappings the same name.
    """
    groups = [((own,) if isinstance(own, str) else own, _stored(stored)) for own, stored in rules.items()]
    mappings: list[WeightMapping] = []
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
            mappings += _mappings(names, _filled(stored.name, match), stored.transforms, shapes)
    if unused := sorted(", ".join(group) for group, _ in groups if group not in used):
        raise ValueError(f"Got rules that fit no parameter: {listed(unused)}. A rule renames something. Remove them.")
    counts = Counter(mapping.hf_name for mapping in mappings)
    if met := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"Got two parameters for {listed(met)}. Names map one to one. Correct the rules.")
    return mappings


def _rule_for(
    name: str, groups: list[tuple[tuple[str, ...], HfTensor]]
) -> tuple[tuple[str, ...], HfTensor, re.Match[str]]:
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


def _mappings(
    names: tuple[str, ...], hf_name: str, transforms: tuple[LayoutTransform, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[WeightMapping]:
    if "#" not in hf_name:
        yield WeightMapping(tuple((name, None) for name in names), (hf_name,), transforms)
        return
    for index in range(shapes[names[0]][0]):
        yield WeightMapping(tuple((name, index) for name in names), (hf_name.replace("#", str(index)),), transforms)


def _stored(stored: str | HfTensor) -> HfTensor:
    return HfTensor(stored) if isinstance(stored, str) else stored


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
