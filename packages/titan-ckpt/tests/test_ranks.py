"""Several ranks save one checkpoint, and any other number of ranks on any mesh loads it bit for bit."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from titan_ckpt import Checkpointer, CheckpointError, TensorReader, check_whole
from titan_ckpt.load import load as loading
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def build_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 5), nn.LayerNorm(5))


def model_on(layout: str) -> nn.Module:
    """Return the same model of odd sizes on 1 to 4 ranks; `layout` is `plain`, `fsdp`, `hsdp`, `tp` or `fsdp_tp`."""
    model, world = build_model(), dist.get_world_size()
    if layout == "plain":
        return model
    if layout == "tp":
        shard_tensor_parallel(model, init_device_mesh("cpu", (world,)))
        return model
    if layout == "fsdp_tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        shard_tensor_parallel(model, mesh["tp"])
        return shard_fully(model, mesh["dp"])
    if layout == "hsdp":
        return shard_fully(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    return shard_fully(model, init_device_mesh("cpu", (world,)))


def shard_tensor_parallel(model, mesh):
    placements = {"0.weight": Shard(0), "0.bias": Shard(0), "1.weight": Shard(1)}
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        sharded = distribute_tensor(parameter.detach(), mesh, [placements.get(name, Replicate())])
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(sharded))


def shard_fully(model, mesh):
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(model):
    """Return the full state as lists, which can be sent to another process."""
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return {name: tensor.tolist() for name, tensor in state.items()}


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(value)


def save_on(layout, folder):
    model = model_on(layout)
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=folder / layout)
    checkpointer.save(1, {"model": model})
    checkpointer.close()
    return full(model)


def load_on(layout, folder):
    model = model_on(layout)
    fill(model, -1)
    checkpointer = Checkpointer.Config(interval=1).build(dump_folder=folder)
    assert checkpointer.load({"model": model}) == 1
    checkpointer.close()
    return full(model)


LAYOUTS = {1: ["plain", "fsdp"], 2: ["fsdp", "tp"], 4: ["fsdp", "hsdp", "tp", "fsdp_tp"]}


def test_any_mesh_loads_the_checkpoint_of_any_other_bit_for_bit(run_ranks, tmp_path):
    def save_all(folder):
        return {layout: save_on(layout, folder) for layout in LAYOUTS[dist.get_world_size()]}

    def load_all(folder):
        return {
            (saved, layout): load_on(layout, folder / saved)
            for saved in sorted(path.name for path in folder.iterdir())
            for layout in LAYOUTS[dist.get_world_size()]
        }

    expected = full(build_model())
    for world in (1, 2, 4):
        for results in run_ranks(world, save_all, tmp_path / str(world)):
            for layout, state in results.items():
                assert state == expected, (world, layout)
    for world in (1, 2, 4):
        for saved_world in (1, 2, 4):
            for results in run_ranks(world, load_all, tmp_path / str(saved_world)):
                for case, state in results.items():
                    assert state == expected, (saved_world, world, case)


def test_each_value_is_written_once(run_ranks, tmp_path):
    def save_all(folder):
        for layout in ("hsdp", "fsdp_tp", "plain"):
            save_on(layout, folder)

    run_ranks(4, save_all, tmp_path)
    numbers = 7 * 12 + 12 + 12 * 5 + 5 + 5 + 5
    for layout in ("hsdp", "fsdp_tp", "plain"):
        files = list((tmp_path / layout / "checkpoint" / "step-1").glob("*.safetensors"))
        payload = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        assert payload == 4 * numbers, layout
        assert len(files) == 4, "the ranks share the writing"


class Values:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def build(folder: Path, **settings) -> Checkpointer:
    return Checkpointer.Config(**{"interval": 1, **settings}).build(dump_folder=folder)


def message_of(action) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def test_values_of_ranks_are_merged_and_a_disagreement_is_an_error_on_all(run_ranks, tmp_path):
    def work(folder):
        rank = dist.get_rank()
        checkpointer = build(folder)
        checkpointer.save(
            1, {"part": Values(same=1, nan=float("nan"), ranks={str(rank): {"seed": rank * 10}})}, last=True
        )
        restored = Values(same=0)
        checkpointer.load({"part": restored})

        def disagree():
            checkpointer.save(2, {"part": Values(deep={"n": [rank]})}, last=True)

        message = message_of(disagree)
        checkpointer.save(2, {"part": Values(fine=1)}, last=True)
        checkpointer.close()
        return restored.state, message

    for state, message in run_ranks(2, work, tmp_path):
        assert state["ranks"] == {"0": {"seed": 0}, "1": {"seed": 10}}
        assert "part.deep.n must be equal on all ranks, got [0] on rank 0 and [1] on rank 1" in message
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*") if "saving" not in path.name) == [
        "step-1",
        "step-2",
    ]


def test_a_failure_on_one_rank_is_an_error_on_all_and_nothing_is_published(run_ranks, tmp_path, monkeypatch):
    pwrite = os.pwrite

    def pwrite_on_a_full_disk(descriptor, data, place):
        raise OSError(28, "No space left on device")

    def work(folder):
        rank = dist.get_rank()
        checkpointer = build(folder)
        bad_state = message_of(lambda: checkpointer.save(1, {"part": Values(a=object() if rank == 1 else 1)}))
        monkeypatch.setattr(os, "pwrite", pwrite_on_a_full_disk if rank == 1 else pwrite)
        checkpointer.save(2, {"part": Values(**{f"w{rank}": torch.ones(4)})})
        bad_write = message_of(checkpointer.wait)
        monkeypatch.setattr(os, "pwrite", pwrite)
        checkpointer.save(4, {"part": Values(w=torch.ones(2))}, last=True)
        here = {"w": torch.ones(2), f"x{rank}": torch.ones(1)}
        missing = message_of(lambda: checkpointer.load({"part": Values(**here)}))
        checkpointer.close()
        return bad_state, bad_write, missing

    for bad_state, bad_write, missing in run_ranks(2, work, tmp_path):
        assert "part.a must be a tensor, number, string" in bad_state
        assert "No space left on device" in bad_write
        assert "part.x0" in missing
        assert "part.x1" in missing
    published = [path.name for path in (tmp_path / "checkpoint").iterdir() if "." not in path.name]
    assert published == ["step-4"]


def test_the_write_plan_changes_when_one_rank_holds_other_tensors(run_ranks, tmp_path):
    here = {name: torch.arange(size) for name, size in {"a": 5, "b": 6, "c": 7}.items()}
    held = {1: ["ab", "ab"], 2: ["ab", "a"], 3: ["ab", "ac"], 4: ["ab", "ac"]}
    writers = {1: {"a": 0, "b": 1}, 2: {"a": 0, "b": 0}, 3: {"a": 0, "b": 0, "c": 1}, 4: {"a": 0, "b": 0, "c": 1}}

    def work(folder):
        checkpointer = build(folder)
        for step, names in held.items():
            checkpointer.save(step, {"part": Values(**{name: here[name] for name in names[dist.get_rank()]})})
        checkpointer.close()

    run_ranks(2, work, tmp_path)
    for step, writer in writers.items():
        check_whole(tmp_path / "checkpoint" / f"step-{step}")
        with TensorReader(tmp_path / "checkpoint" / f"step-{step}") as reader:
            files = {name: stored.chunks[0].file for name, stored in reader.index.items()}
            assert files == {f"part.{name}": f"rank-{rank:05}.safetensors" for name, rank in writer.items()}
            for name in writer:
                assert torch.equal(reader.read(f"part.{name}"), here[name]), (step, name)


def test_inconsistent_tensors_of_ranks_are_an_error(run_ranks, tmp_path):
    def work(folder):
        rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
        checkpointer = build(folder)
        tensor = DTensor.from_local(torch.ones(2, dtype=torch.float32 if rank else torch.float64), mesh, [Shard(0)])
        dtypes = message_of(lambda: checkpointer.save(1, {"part": Values(w=tensor)}, last=True))
        hole = Values(**({"w": DTensor.from_local(torch.ones(2), mesh, [Shard(0)])} if rank else {}))
        holes = message_of(lambda: checkpointer.save(2, {"part": hole}, last=True))
        checkpointer.close()
        return dtypes, holes

    for dtypes, holes in run_ranks(2, work, tmp_path):
        assert (
            "part.w must have the same dtype and shape on all ranks, got F64 (4,) on one rank and F32 (4,) on another"
            in dtypes
        )
        assert "part.w must cover its 4 elements exactly once, got 2" in holes


def test_saves_do_not_interfere_with_collectives_of_training(run_ranks, tmp_path):
    def work(folder):
        checkpointer = build(folder, keep_latest_k=2)
        weights, threads = torch.ones(200_000), set()
        for step in range(1, 9):
            checkpointer.save(step, {"part": Values(w=weights, step=step)})
            threads |= {thread.name for thread in threading.enumerate()}
            for _ in range(20):
                dist.all_reduce(weights)
                weights /= 2
        checkpointer.close()
        return weights.eq(1).all().item(), any(name.startswith("titan-ckpt") for name in threads)

    assert run_ranks(2, work, tmp_path) == [(True, True)] * 2
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*")) == ["step-7", "step-8"]


def test_damage_found_by_one_rank_is_reported_on_all(run_ranks, tmp_path):
    def save_two(folder):
        checkpointer = build(folder)
        for step in (1, 2):
            checkpointer.save(step, {"part": Values(**{f"w{dist.get_rank()}": torch.full((100,), step)})})
        checkpointer.close()

    def load(folder):
        checkpointer = build(folder)
        part = Values(**{f"w{dist.get_rank()}": torch.zeros(100, dtype=torch.int64)})
        step = checkpointer.load({"part": part})
        return (
            step,
            [broken.reason for broken in checkpointer.skipped],
            part.state[f"w{dist.get_rank()}"].sum().item(),
        )

    run_ranks(2, save_two, tmp_path)
    path = tmp_path / "checkpoint" / "step-2" / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    for step, reasons, total in run_ranks(2, load, tmp_path):
        assert (step, total) == (1, 100)
        assert len(reasons) == 1
        assert "rank-00001.safetensors has the right size but changed content" in reasons[0]


def test_these_tests_detect_shards_at_the_wrong_place(run_ranks, tmp_path, monkeypatch):
    def save(folder):
        save_on("fsdp", folder)

    run_ranks(2, save, tmp_path)
    right = loading.local_chunks

    def shifted(tensors):
        return {name: replace(chunk, offsets=(0,) * len(chunk.shape)) for name, chunk in right(tensors).items()}

    monkeypatch.setattr(loading, "local_chunks", shifted)
    for state in run_ranks(2, load_on, "fsdp", tmp_path / "fsdp"):
        assert state != full(build_model())


def tensors_of_half() -> dict[str, torch.Tensor]:
    """On two ranks of four: a weight of this half only, and three that the other half holds too."""
    half, meshes = dist.get_rank() // 2, init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "dp"))
    shared, own = torch.arange(15.0).view(5, 3), torch.arange(7.0) + half
    return {
        "shared": distribute_tensor(shared, meshes["dp"], [Shard(0)]),
        "copied": distribute_tensor(shared + 1, meshes["dp"], [Replicate()]),
        "plain": shared + 2,
        f"own{half}": distribute_tensor(own, meshes["dp"], [Shard(0)]),
    }


class Tensors:
    def __init__(self, tensors):
        self.tensors = tensors

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state):
        self.tensors = state


def test_tensors_on_two_meshes_are_written_once_and_loaded_by_both(run_ranks, tmp_path):
    def save_and_load():
        saved = tensors_of_half()
        part = Tensors(saved)
        checkpointer = Checkpointer.Config(interval=1).build(dump_folder=tmp_path)
        checkpointer.save(1, {"weights": part})
        checkpointer.close()
        fresh = Tensors({name: torch.zeros_like(tensor) for name, tensor in tensors_of_half().items()})
        assert Checkpointer.Config(interval=1).build(dump_folder=tmp_path).load({"weights": fresh}) == 1
        whole = [
            [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors.values()]
            for tensors in (saved, fresh.tensors)
        ]
        return all(torch.equal(a, b) for a, b in zip(*whole, strict=True))

    assert run_ranks(4, save_and_load) == [True] * 4
    with TensorReader(tmp_path / "checkpoint" / "step-1") as reader:
        names = {name.removeprefix("weights.") for name in reader.index if name.startswith("weights.")}
        assert names == {"shared", "copied", "plain", "own0", "own1"}
        assert torch.equal(reader.read("weights.shared"), torch.arange(15.0).view(5, 3))
        assert len(reader.index["weights.shared"].chunks) == 2  # one for each rank of one mesh
        assert len(reader.index["weights.copied"].chunks) == len(reader.index["weights.plain"].chunks) == 1


def test_an_invalid_step_on_one_rank_is_an_error_on_all(run_ranks, tmp_path):
    def work(folder):
        checkpointer = Checkpointer.Config(interval=1).build(dump_folder=folder)
        with pytest.raises(CheckpointError, match=r"step must be an integer from 0 to 9+, got 2\.0") as refused:
            checkpointer.save(2.0 if dist.get_rank() else 2, {"model": build_model()})
        checkpointer.close()
        return str(refused.value)

    assert len(run_ranks(2, work, tmp_path)) == 2
    assert not list((tmp_path / "checkpoint").glob("step-*"))
