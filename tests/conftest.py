"""Fixtures of the tests of several packages: debug recipes, small enough to train in seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from titan_config import Configurable
from titan_models import GroupedQueryAttention
from titan_models.moe import MoE

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def recipe():
    """`recipe("llama3_debug")` imports a recipe by its file name."""

    sys.path.append(str(REPO / "recipes"))  # as for a recipe that is run as a script

    def load(name: str) -> ModuleType:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, REPO / "recipes" / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load


def change(config: Configurable.Config, changes: dict) -> None:
    """Set config fields by path: `{"training.steps": 5}`."""
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, name, value)


def narrow(block: Configurable.Config) -> None:
    """Shrink a block to 4 heads, 2 KV heads, feed-forward layers 128 wide, and windows shorter than the sequences."""
    block.attention.num_heads = 4
    if isinstance(block.attention, GroupedQueryAttention.Config):
        block.attention.num_kv_heads = 2
    is_mixture = isinstance(block.feed_forward, MoE.Config)
    change(block, {"feed_forward.experts.hidden_dim" if is_mixture else "feed_forward.hidden_dim": 128})
    if is_mixture and block.feed_forward.shared is not None:
        block.feed_forward.shared.hidden_dim = 128
    for limit in block.attention.mask_modifiers:
        limit.size = 16


@pytest.fixture
def balanced_experts(recipe) -> Configurable.Config:
    """A model config of four narrow layers for `small_run`, with a balancing bias that changes fast."""
    from titan_models.moe import BalancingBias

    model = recipe("qwen3_moe_debug").qwen3_moe_debug().model
    small = {
        "num_layers": 4,
        "dim": 64,
        "block.attention.num_heads": 4,
        "block.attention.num_kv_heads": 2,
        "block.feed_forward.experts.hidden_dim": 64,
        "block.feed_forward.router.balancing": BalancingBias.Config(rate=0.01),
    }
    change(model, small)
    return model


@pytest.fixture
def small_run(recipe, tmp_path):
    """`small_run("name", {"training.steps": 5})`: a debug recipe with two narrow layers, 8 sequences of 64 tokens."""

    def config(name: str = "run", changes: dict | None = None, flavor: str = "llama3_debug"):
        run = getattr(recipe(flavor), flavor)()
        small = {
            "model.num_layers": 4 if run.model.layer_overrides else 2,
            "model.dim": 64,
            "training.seq_len": 64,
            "training.global_batch_size": 8,
            "training.local_batch_size": 2,
            "training.steps": 20,
            "lr_scheduler.total_steps": 20,
            "validator": None,
            "checkpoint": None,
            "dump_folder": tmp_path / name,
        }
        change(run, small)
        for block in run.model.blocks():
            narrow(block)
        change(run, changes or {})
        return run

    return config
