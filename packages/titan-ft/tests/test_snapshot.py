"""A replica that joins receives the state of a live replica, on its own mesh."""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from datetime import timedelta
from decimal import Decimal
from enum import IntEnum
from typing import Any

import pytest
import torch
import torch.distributed as dist
from titan_ft.snapshot import check_leaves, meshes_of, restore_snapshot, take_snapshot
from titan_ft.transport import SnapshotTransport
from titan_ft.wire import pack
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def a_state(name: str = "shard") -> dict[str, Any]:
    """Return uneven shards, a replicated tensor, plain tensors of many dtypes, and JSON, as in real states."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))
    whole = torch.arange(35.0).view(5, 7)
    return {
        "model": {
            "rows": distribute_tensor(whole, mesh, [Shard(0)]),
            "columns": distribute_tensor(whole.bfloat16(), mesh, [Shard(1)]),
            "norm": distribute_tensor(whole[0], mesh, [Replicate()]),
            "parameter": torch.nn.Parameter(whole.double()),
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]},
        "streams": {"counts": torch.tensor([2**60, 1]), "mask": torch.tensor([True, False]), "empty": torch.empty(0)},
        "step": 7,
        "name": "run",
        "off": None,
    }


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected) or isinstance(expected, torch.nn.Parameter)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, DTensor):
        assert (got.shape, got.stride(), got.placements) == (expected.shape, expected.stride(), expected.placements)
        assert got.dtype == expected.dtype
        assert torch.equal(got.full_tensor(), expected.full_tensor())
    elif isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_a_state_is_restored_on_the_mesh_of_the_receiver(run_ranks):
    def heal() -> None:
        live = a_state()
        receiver = a_state()
        receiver_meshes = meshes_of({"model": receiver["model"]})  # its optimizer may have no state yet
        transport = SnapshotTransport("127.0.0.1", timedelta(seconds=600))
        transport.send_checkpoint([1], step=7, state_dict={"user": take_snapshot(live)}, timeout=timedelta(seconds=600))
        with torch.no_grad():
            live["model"]["parameter"].zero_()  # training continues while the copy is in transit
        received = transport.recv_checkpoint(0, transport.metadata(), step=7, timeout=timedelta(seconds=600))
        healed = restore_snapshot(received["user"], receiver_meshes)
        assert_same(healed, receiver)
        assert healed["model"]["rows"].device_mesh is receiver["model"]["rows"].device_mesh
        healed["model"]["rows"].add_(1)  # the restored state is writable
        with pytest.raises(AssertionError):
            assert_same(healed, receiver)
        transport.shutdown()

    run_ranks(2, heal)


class Sheared(Shard):
    """A custom placement, which a receiver cannot rebuild."""


def test_an_unknown_mesh_or_placement_is_named(run_ranks):
    def heal() -> None:
        snapshot = take_snapshot(a_state("shard"))
        message = r"must have the same mesh, got model\.rows sharded over .*shard.*replicate.*same number of ranks"
        with pytest.raises(ValueError, match=message):
            restore_snapshot(snapshot, meshes_of(a_state("replicate")))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        sheared = DTensor.from_local(torch.ones(2, 2), mesh, [Sheared(0)])
        with pytest.raises(TypeError, match=r"placements of model\.w in the registered state must be of Shard"):
            check_leaves({"model": {"w": sheared}})
        with pytest.raises(TypeError, match="A placement must be one of Shard, _StridedShard, Replicate, Partial, got"):
            pack(take_snapshot({"w": sheared}))

    run_ranks(2, heal)


class Color(IntEnum):
    RED = 1


Betas = namedtuple("Betas", ["first", "second"])


@pytest.mark.parametrize(
    "leaf", [object(), Decimal("0.5"), Color.RED, Betas(0.9, 0.95), type("Real", (float,), {})(0.5)]
)
def test_unsupported_values_are_named_before_the_first_step(leaf):
    check_leaves({"a": [1, {"b": torch.ones(1)}], "c": (None, True, "x"), 2: 0.5})
    name = type(leaf).__name__
    with pytest.raises(
        TypeError, match=rf"a\.1\.b in the registered state must be a tensor or a JSON value, got {name}\."
    ):
        check_leaves({"a": [1, {"b": leaf}]})
    with pytest.raises(TypeError, match=f"must contain only tensors and JSON values, got {name}"):
        pack({"a": leaf})
    with pytest.raises(TypeError, match=r"Keys of the registered state must be JSON values, got tuple in a"):
        check_leaves({"a": {(1, 2): 3}})


def test_a_snapshot_is_freed_after_disallow_checkpoint():
    transport = SnapshotTransport("127.0.0.1", timedelta(seconds=600))
    snapshot = take_snapshot({"weights": torch.ones(3)})
    reference = weakref.ref(snapshot.values["weights"])
    transport.send_checkpoint([1], step=0, state_dict={"user": snapshot}, timeout=timedelta(seconds=600))
    del snapshot
    assert reference() is not None
    transport.disallow_checkpoint()
    gc.collect()
    assert reference() is None
    transport.shutdown()
