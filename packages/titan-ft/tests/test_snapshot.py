"""What a newcomer gets is what the live replica had, on the newcomer's own mesh."""

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
from titan_ft.snapshot import check_leaves, meshes_of, put_together, take
from titan_ft.transport import SnapshotTransport
from titan_ft.wire import packed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def a_state(name: str = "shard") -> dict[str, Any]:
    """Uneven shards, a replicated tensor, plain ones of many dtypes, and JSON, as optimizers and loaders have them."""
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


def test_a_state_is_put_together_on_the_mesh_of_the_newcomer(run_ranks):
    def heal() -> None:
        live = a_state()
        newcomer = a_state()
        newcomer_meshes = meshes_of({"model": newcomer["model"]})  # its optimizer may have no state yet
        transport = SnapshotTransport("127.0.0.1", timedelta(seconds=600))
        transport.send_checkpoint([1], step=7, state_dict={"user": take(live)}, timeout=timedelta(seconds=600))
        with torch.no_grad():
            live["model"]["parameter"].zero_()  # goes on while the copy travels
        received = transport.recv_checkpoint(0, transport.metadata(), step=7, timeout=timedelta(seconds=600))
        healed = put_together(received["user"], newcomer_meshes)
        assert_same(healed, newcomer)
        assert healed["model"]["rows"].device_mesh is newcomer["model"]["rows"].device_mesh
        healed["model"]["rows"].add_(1)  # it is the newcomer's to change
        with pytest.raises(AssertionError):
            assert_same(healed, newcomer)
        transport.shutdown()

    run_ranks(2, heal)


class Sheared(Shard):
    """A placement of a user, of which a newcomer knows nothing."""


def test_a_mesh_or_a_placement_that_the_newcomer_has_not_is_named(run_ranks):
    def heal() -> None:
        snapshot = take(a_state("shard"))
        message = r"Got model\.rows split over the mesh .*shard.*replicate.*same number of ranks"
        with pytest.raises(ValueError, match=message):
            put_together(snapshot, meshes_of(a_state("replicate")))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        sheared = DTensor.from_local(torch.ones(2, 2), mesh, [Sheared(0)])
        with pytest.raises(
            TypeError, match=r"model\.w of the state that heals replicas must be placed by one of Shard"
        ):
            check_leaves({"model": {"w": sheared}})
        with pytest.raises(TypeError, match="A placement must be one of Shard, _StridedShard, Replicate, Partial, got"):
            packed(take({"w": sheared}))

    run_ranks(2, heal)


class Color(IntEnum):
    RED = 1


Betas = namedtuple("Betas", ["first", "second"])


@pytest.mark.parametrize(
    "leaf", [object(), Decimal("0.5"), Color.RED, Betas(0.9, 0.95), type("Real", (float,), {})(0.5)]
)
def test_what_cannot_travel_is_named_before_the_first_step(leaf):
    check_leaves({"a": [1, {"b": torch.ones(1)}], "c": (None, True, "x"), 2: 0.5})
    name = type(leaf).__name__
    with pytest.raises(TypeError, match=rf"a\.1\.b of the state .* must be a tensor or a JSON value, got {name}\."):
        check_leaves({"a": [1, {"b": leaf}]})
    with pytest.raises(TypeError, match=f"must hold tensors and JSON values, got {name}"):
        packed({"a": leaf})
    with pytest.raises(TypeError, match=r"Keys of the state .* must be JSON values, got tuple in a"):
        check_leaves({"a": {(1, 2): 3}})


def test_a_snapshot_is_let_go_once_nobody_needs_it():
    transport = SnapshotTransport("127.0.0.1", timedelta(seconds=600))
    snapshot = take({"weights": torch.ones(3)})
    reference = weakref.ref(snapshot.values["weights"])
    transport.send_checkpoint([1], step=0, state_dict={"user": snapshot}, timeout=timedelta(seconds=600))
    del snapshot
    assert reference() is not None
    transport.disallow_checkpoint()
    gc.collect()
    assert reference() is None
    transport.shutdown()
