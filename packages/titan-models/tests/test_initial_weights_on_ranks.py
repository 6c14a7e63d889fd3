"""Initial weights have the same bits on any mesh under any sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from titan_models import Decoder
from titan_models.initialization import counter_based_rng as rng
from titan_models.llama3 import llama3_1b, llama3_8b


def uneven(shrunk: Any, flavor: Any) -> Decoder.Config:
    """Return a config with several tiles, and sizes that no number of ranks divides."""
    config = shrunk(flavor)
    config.vocab_size, config.dim, config.num_layers = 391, 151, 2
    config.block.feed_forward.hidden_dim = 277
    return config


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in model.named_parameters()
    }


def sharded(config: Decoder.Config, case: str) -> Decoder:
    """Return the initialized model on a mesh of all ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def split(name: str, module: torch.nn.Module, mesh: Any) -> None:
        dims = {"q_proj": 0, "gate_proj": 0, "o_proj": 1, "down_proj": 1, "embedding": 0, "head": 0}
        dim = dims.get(name.rpartition(".")[2])
        if dim is not None:
            module.weight = torch.nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(dim)]))

    ranks = dist.get_world_size()
    model = config.on_meta()
    if case == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
    elif case == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    elif case == "tp":
        mesh = init_device_mesh("cpu", (ranks,))
    elif case == "fsdp x tp":
        whole = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("shard", "tp"))
        mesh = whole["shard"]
    if "tp" in case:
        distribute_module(model, whole["tp"] if case == "fsdp x tp" else mesh, split)
    if case != "tp":
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.init_weights(seed=11)
    return model


CASES = {1: ["fsdp"], 2: ["fsdp", "tp"], 3: ["fsdp", "tp"], 4: ["fsdp", "hsdp", "tp", "fsdp x tp"]}


@pytest.mark.parametrize("ranks", CASES)
def test_the_bits_are_the_same_on_any_mesh(ranks: int, run_ranks: Callable[..., list[Any]], shrunk: Any) -> None:
    configs = {"untied": uneven(shrunk, llama3_8b), "tied": uneven(shrunk, llama3_1b)}
    expected = {}
    for kind, config in configs.items():
        model = config.build()
        model.init_weights(seed=11)
        expected[kind] = dict(model.named_parameters())

    def compare() -> list[str]:
        different = []
        for case in CASES[ranks]:
            for kind, config in configs.items():
                if kind == "tied" and "tp" in case:
                    continue  # distribute_module unties the weights; ties are restored by titan-parallel
                ours = weights(sharded(config, case))
                assert ours.keys() == expected[kind].keys()
                different += [f"{case}: {name}" for name in ours if not torch.equal(ours[name], expected[kind][name])]
        return different

    assert run_ranks(ranks, compare) == [[]] * ranks


def test_the_tests_detect_a_rank_with_wrong_offsets(
    run_ranks: Callable[..., list[Any]], shrunk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = uneven(shrunk, llama3_8b)
    model = config.build()
    model.init_weights(seed=11)
    monkeypatch.setattr("titan_models.weights.local_shard", lambda p: (p.to_local(), (0,) * p.dim()))

    def differs() -> list[bool]:
        ours = weights(sharded(config, "fsdp"))
        return [not torch.equal(ours[name], parameter) for name, parameter in model.named_parameters()]

    assert all(any(result) for result in run_ranks(2, differs))


def test_a_rank_generates_only_the_tiles_of_its_shard(
    run_ranks: Callable[..., list[Any]], shrunk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shrunk(llama3_8b)
    config.vocab_size, config.dim, config.num_layers = 2048, 256, 1
    original = rng.uniform

    def count(ranks: int) -> int:
        drawn = []
        monkeypatch.setattr(rng, "uniform", lambda key, first, n: drawn.append(n) or original(key, first, n))
        model = sharded(config, "fsdp") if ranks > 1 else config.build()
        drawn.clear()
        model.init_weights(seed=0)
        return sum(drawn)

    alone = count(1)
    for share in run_ranks(4, count, 4):
        assert share < 0.4 * alone
