"""The state sent from a live replica to one that joins: plain CPU tensors, JSON values, and the layout of each tensor.

Rank r of the replica that joins receives the state of rank r of a live replica. Their meshes have the same shape but
consist of different processes. A `DTensor` is therefore sent as its local tensor, and rebuilt on the receiver's own
mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

State = dict[str, Any]
Path = tuple[str | int, ...]
MeshKey = tuple[tuple[str, ...] | None, tuple[int, ...]]

JSON_TYPES = (type(None), bool, int, float, str)
"""Exactly these types: a subclass, such as NumPy's float64 or an IntEnum, would arrive as its base type."""
PLACEMENTS = ("Shard", "_StridedShard", "Replicate", "Partial")


@dataclass(frozen=True)
class Sharding:
    """Sharding of a `DTensor`: its mesh (names and sizes of the axes), and its placements, global shape and stride."""

    mesh: MeshKey
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The device type of a tensor and, for a `DTensor`, its sharding."""

    device_type: str
    sharding: Sharding | None


@dataclass(frozen=True)
class Snapshot:
    """A state in transit: `values` is the state with CPU copies of local tensors, `layouts` their layouts."""

    values: State
    layouts: dict[Path, Layout]


def check_leaves(state: State) -> None:
    """Raise TypeError unless `state` consists of dictionaries, lists and tuples of tensors and JSON values."""

    def check(path: Path, leaf: Any) -> None:
        if isinstance(leaf, DTensor):
            unsupported = [each for each in leaf.placements if type(each).__name__ not in PLACEMENTS]
            if unsupported:
                raise TypeError(
                    f"The placements of {_name(path)} in the registered state must be of {', '.join(PLACEMENTS)}, got "
                    f"{unsupported[0]}."
                )
        elif not isinstance(leaf, Tensor) and type(leaf) not in JSON_TYPES:
            raise TypeError(
                f"{_name(path)} in the registered state must be a tensor or a JSON value, got {type(leaf).__name__}. "
                "Return the fields of that object instead."
            )
        invalid_keys = [key for key in path if type(key) not in JSON_TYPES]
        if invalid_keys:
            raise TypeError(
                f"Keys of the registered state must be JSON values, got {type(invalid_keys[0]).__name__} in "
                f"{_name(path)}."
            )

    _map_leaves(check, state)


def take_snapshot(state: State) -> Snapshot:
    """Return a copy of `state` on the CPU, which later changes of `state` do not affect."""
    layouts: dict[Path, Layout] = {}

    def copy(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        layouts[path] = _layout(leaf)
        return _local(leaf).to("cpu", copy=True)

    return Snapshot(_map_leaves(copy, state), layouts)


def restore_snapshot(snapshot: Snapshot, meshes: dict[MeshKey, DeviceMesh]) -> State:
    """Return the state of a snapshot, on this rank's devices and on `meshes`.

    Raises ValueError if a tensor was sharded over a mesh that this replica lacks.
    """

    def place(path: Path, leaf: Any) -> Any:
        layout = snapshot.layouts.get(path)
        if layout is None:
            return leaf
        local = leaf.to(layout.device_type, copy=True)  # received buffers are read-only
        if layout.sharding is None:
            return local
        sharding = layout.sharding
        if sharding.mesh not in meshes:
            raise ValueError(
                f"All replicas must have the same mesh, got {_name(path)} sharded over {sharding.mesh}; this replica "
                f"has {list(meshes)}. Start all replicas with the same number of ranks and the same parallel sizes."
            )
        mesh = meshes[sharding.mesh]
        return DTensor.from_local(local, mesh, sharding.placements, shape=sharding.shape, stride=sharding.stride)

    return dict(_map_leaves(place, snapshot.values))


def meshes_of(state: State) -> dict[MeshKey, DeviceMesh]:
    """Return the meshes of the `DTensor`s in `state`."""
    return {_mesh_key(leaf.device_mesh): leaf.device_mesh for leaf in _leaves(state) if isinstance(leaf, DTensor)}


def tensor_specs(state: State) -> list[Any]:
    """Return the name, shape, dtype and mesh of each tensor in `state`, as JSON values."""
    specs: list[Any] = []

    def add(path: Path, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            mesh = _mesh_key(leaf.device_mesh) if isinstance(leaf, DTensor) else None
            specs.append([_name(path), list(leaf.shape), str(leaf.dtype), mesh])

    _map_leaves(add, state)
    return specs


def _mesh_key(mesh: DeviceMesh) -> MeshKey:
    names = mesh.mesh_dim_names
    return (tuple(names) if names is not None else None, tuple(mesh.shape))


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _layout(tensor: Tensor) -> Layout:
    sharding = None
    if isinstance(tensor, DTensor):
        sharding = Sharding(_mesh_key(tensor.device_mesh), tuple(tensor.placements), tensor.shape, tensor.stride())
    return Layout(tensor.device.type, sharding)


def _map_leaves(function: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    if isinstance(tree, dict):
        return {key: _map_leaves(function, value, (*path, key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_map_leaves(function, value, (*path, index)) for index, value in enumerate(tree))
    return function(path, tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif type(tree) in (list, tuple):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree
