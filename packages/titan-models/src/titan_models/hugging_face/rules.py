"""Rules that map weights of a model to tensors of Hugging Face checkpoints: name patterns and layout transforms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from titan_models.hugging_face.layout_transforms import LayoutTransform
from titan_models.hugging_face.weight_mapping import WeightMapping


@dataclass(frozen=True)
class HfTensor:
    """The tensor of a Hugging Face checkpoint that stores weights: its `name`, and `transforms` applied in order.

    >>> HfTensor("model.layers.*.mlp.experts.gate_up_proj", Halves(dim=-2), Transposed())  # doctest: +SKIP
    """

    name: str
    transforms: tuple[LayoutTransform, ...]

    def __init__(self, name: str, *transforms: LayoutTransform) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "transforms", transforms)


Rules = dict[str | tuple[str, ...], str | HfTensor]
"""`{pattern: Hugging Face pattern}`, or `{(patterns): HfTensor(...)}` for several weights stored as one tensor."""


def mappings_of(shapes: Mapping[str, tuple[int, ...]], rules: Rules) -> list[WeightMapping]:
    """Return the mapping of each weight.

    Raises ValueError unless each weight matches exactly one rule, each rule matches a weight, and all Hugging Face
    names are distinct.
    """
    groups = [((own,) if isinstance(own, str) else own, _as_hf_tensor(stored)) for own, stored in rules.items()]
    mappings: list[WeightMapping] = []
    used = set()
    for name in shapes:
        group, stored, match = _rule_for(name, groups)
        used.add(group)
        names = tuple(_fill(pattern, match) for pattern in group)
        if missing := [other for other in names if other not in shapes]:
            raise ValueError(
                f"All weights of a rule must be in the model, got a rule for {name} and {listed(missing)}, which the "
                "model does not have."
            )
        if name == names[0]:
            mappings += _mappings(names, _fill(stored.name, match), stored.transforms, shapes)
    if unused := sorted(", ".join(group) for group, _ in groups if group not in used):
        raise ValueError(f"Each rule must match a parameter, got no match for {listed(unused)}. Remove the rules.")
    counts = Counter(mapping.hf_name for mapping in mappings)
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"Each Hugging Face name must belong to one parameter, got several for {listed(duplicates)}.")
    return mappings


def _rule_for(
    name: str, groups: list[tuple[tuple[str, ...], HfTensor]]
) -> tuple[tuple[str, ...], HfTensor, re.Match[str]]:
    matches = [
        (group, stored, match)
        for group, stored in groups
        for pattern in group
        if (match := re.fullmatch(_to_regex(pattern), name))
    ]
    if len(matches) != 1:
        raise ValueError(f"Each parameter must match exactly one rule, got {len(matches)} for {name}.")
    return matches[0]


def _mappings(
    names: tuple[str, ...], hf_name: str, transforms: tuple[LayoutTransform, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[WeightMapping]:
    if "#" not in hf_name:
        yield WeightMapping(tuple((name, None) for name in names), (hf_name,), transforms)
        return
    for index in range(shapes[names[0]][0]):
        yield WeightMapping(tuple((name, index) for name in names), (hf_name.replace("#", str(index)),), transforms)


def _as_hf_tensor(tensor: str | HfTensor) -> HfTensor:
    return HfTensor(tensor) if isinstance(tensor, str) else tensor


def _to_regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"([^.]+)")


def _fill(pattern: str, match: re.Match[str]) -> str:
    """Return the pattern with each `*` replaced by the match of the same `*` in another pattern."""
    first, *parts = pattern.split("*")
    return first + "".join(star + part for star, part in zip(match.groups(), parts, strict=False))


def listed(names: list[str]) -> str:
    """Return at most 8 names, joined for an error message."""
    shown = ", ".join(names[:8]) or "nothing"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
