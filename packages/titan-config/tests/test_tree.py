"""Traverse a config tree, replace parts of it, compare trees and print them as text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from titan_config import ConfigError, Configurable, diff, replace, save, to_dict, to_text, traverse


class Linear(Configurable):
    class Config(Configurable.Config):
        dim: int = 1


class LoRA(Configurable):
    class Config(Linear.Config):
        linear: Linear.Config
        rank: int = 8


class Block(Configurable):
    class Config(Configurable.Config):
        up: Linear.Config = Linear.Config(dim=2)
        others: dict[str, Linear.Config] = {"gate.proj": Linear.Config(dim=3)}
        drop: float = 0.0
        tags: list[str] = ["a", "b"]


class Model(Configurable):
    class Config(Configurable.Config):
        blocks: list[Block.Config] = [Block.Config(), Block.Config()]
        head: tuple[Linear.Config, ...] = (Linear.Config(dim=4),)
        folder: Path = Path("out")
        init: Callable[..., float] | None = functools.partial(pow, exp=2)


T = __name__


def test_traverse_yields_every_config_parents_first():
    config = Block.Config()
    assert list(traverse(config)) == [("", config), ("up", config.up), ("others.gate.proj", config.others["gate.proj"])]
    assert list(traverse(config))[1][1] is config.up
    paths = [path for path, node in traverse(Model.Config()) if isinstance(node, Linear.Config)]
    assert paths == ["blocks.0.up", "blocks.0.others.gate.proj", "blocks.1.up", "blocks.1.others.gate.proj", "head.0"]


def test_replace_by_path_does_not_change_the_original():
    config = Model.Config()
    new = replace(config, "blocks.1.others.gate.proj.dim", 9)
    assert new.blocks[1].others["gate.proj"].dim == 9
    assert config == Model.Config()
    assert replace(config, "head.0", Linear.Config(dim=5)).head == (Linear.Config(dim=5),)
    assert replace(config, "blocks.0.tags.1", "z").blocks[0].tags == ["a", "z"]
    assert replace(config, "init", abs).init is abs


def test_replace_copies_the_new_value():
    part = Linear.Config(dim=7)
    new = replace(Model.Config(), "blocks.0.up", part)
    part.dim = 8
    assert new.blocks[0].up.dim == 7


def test_replace_by_predicate_replaces_every_match_children_first():
    def wrap(old: Linear.Config) -> LoRA.Config:
        return LoRA.Config(linear=old)

    config = Model.Config()
    new = replace(config, lambda node: type(node) is Linear.Config and node.dim > 2, wrap)
    assert [path for path, node in traverse(new) if isinstance(node, LoRA.Config)] == [
        "blocks.0.others.gate.proj",
        "blocks.1.others.gate.proj",
        "head.0",
    ]
    assert new.head[0].linear == Linear.Config(dim=4)
    assert config == Model.Config()
    blocks = replace(config, lambda node: isinstance(node, Block.Config), Block.Config(drop=0.5)).blocks
    assert [block.drop for block in blocks] == [0.5, 0.5]
    assert blocks[0] is not blocks[1]


def test_replace_in_a_built_config_returns_a_mutable_config():
    class Owner(Configurable):
        class Config(Configurable.Config):
            part: Linear.Config = Linear.Config()

        def __init__(self, config: Config):
            self.config = config

    new = replace(Owner.Config().build().config, "part.dim", 5)
    new.part.dim = 6
    assert new.part.dim == 6


def test_replace_without_a_match_is_an_error():
    with pytest.raises(ConfigError, match=r"Block.Config has no 'blocks' \(path blocks\). Use one of: drop"):
        replace(Block.Config(), "blocks", 1)
    with pytest.raises(ConfigError, match=r"Block.Config has no 'upp' \(path upp\). Did you mean up\?"):
        replace(Model.Config(), "blocks.0.upp", 1)
    with pytest.raises(ConfigError, match="predicate must match at least one config of the tree, got no match"):
        replace(Model.Config(), lambda node: False, Linear.Config())
    with pytest.raises(ConfigError, match="must be int"):
        replace(Model.Config(), "head.0.dim", "3")


TEXT = f"""\
$type: {T}:Model.Config
blocks.0: {T}:Block.Config
blocks.0.drop: 0.0
blocks.0.others.gate.proj: {T}:Linear.Config
blocks.0.others.gate.proj.dim: 3
blocks.0.tags: ['a', 'b']
blocks.0.up: {T}:Linear.Config
blocks.0.up.dim: 2
folder: out
head.0: {T}:Linear.Config
head.0.dim: 4
init: partial(builtins:pow, exp=2)
"""


def test_text_is_sorted_lines_of_path_and_value():
    config = Model.Config(blocks=[Block.Config()])
    assert to_text(config) == to_text(to_dict(config)) == TEXT


def test_diff_of_configs_data_and_files_agree(tmp_path):
    old, new = Model.Config(blocks=[Block.Config()]), Model.Config(head=(LoRA.Config(linear=Linear.Config()),))
    new.blocks[0].drop = 0.1
    new.blocks[0].tags = []
    changes = diff(old, new)
    assert changes[:4] == [
        ("blocks.0.drop", 0.0, 0.1),
        ("blocks.0.tags", ["a", "b"], []),
        ("blocks.1", "(absent)", f"{T}:Block.Config"),
        ("blocks.1.drop", "(absent)", 0.0),
    ]
    assert changes[-5:] == [
        ("head.0", f"{T}:Linear.Config", f"{T}:LoRA.Config"),
        ("head.0.dim", 4, 1),
        ("head.0.linear", "(absent)", f"{T}:Linear.Config"),
        ("head.0.linear.dim", "(absent)", 1),
        ("head.0.rank", "(absent)", 8),
    ]
    assert str(changes[0]) == "blocks.0.drop: 0.0 -> 0.1"
    save(old, tmp_path / "old.json")
    save(new, tmp_path / "new.json")
    assert diff(to_dict(old), to_dict(new)) == changes
    assert diff(tmp_path / "old.json", str(tmp_path / "new.json")) == changes
    assert diff(old, old) == []


def test_diff_of_files_imports_nothing(tmp_path):
    for name, dim in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f'{{"$type": "not_installed:A.Config", "dim": {dim}, "t": {{"$tuple": [1]}}}}')
    assert diff(tmp_path / "a", tmp_path / "b") == [("dim", 1, 2)]


def test_diff_distinguishes_types():
    one, two = {"$type": "m:A", "x": 1, "y": [1]}, {"$type": "m:A", "x": 1.0, "y": {"$tuple": [1]}}
    assert [change.path for change in diff(one, two)] == ["x", "y"]
