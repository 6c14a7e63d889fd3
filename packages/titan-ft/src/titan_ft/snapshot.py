"""What travels from a live replica to a newcomer: plain CPU tensors and JSON values, and how each tensor lay.

Rank r of the newcomer takes what rank r of a live replica keeps. Both have a mesh of the same shape, made of other
processes: so a `DTensor` travels as its local part, and is put together again on the newcomer's own mesh.
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
"""Exactly these: a subclass, such as numpy's float64 or an IntEnum, would arrive as something else."""
PLACEMENTS = ("Shard", "_StridedShard", "Replicate", "Partial")


@dataclass(frozen=True)
class Split:
    """How a tensor was split: over which mesh (by names and sizes of its axes), and out of which whole."""

    mesh: MeshKey
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a tensor lay: on which kind of device, and, of a `DTensor`, how it was split."""

    device_type: str
    split: Split | None


@dataclass(frozen=True)
class Snapshot:
    """A state as it travels. `values` is the state with CPU copies of local tensors; `layouts` says what each was."""

    values: State
    layouts: dict[Path, Layout]


def check_leaves(state: State) -> None:
    """Raise TypeError for what cannot travel: `state` holds tensors and JSON values, in dictionaries, lists, tuples."""

    def check(path: Path, leaf: Any) -> None:
        if isinstance(leaf, DTensor):
            strange = [each for each in leaf.placements if type(each).__name__ not in PLACEMENTS]
            if strange:
                raise TypeError(
                    f"{_name(path)} of the state that heals replicas must be placed by one of {', '.join(PLACEMENTS)}, "
                    f"got {strange[0]}."
                )
        elif not isinstance(leaf, Tensor) and type(leaf) not in JSON_TYPES:
            raise TypeError(
                f"{_name(path)} of the state that heals replicas must be a tensor or a JSON value, got "
                f"{type(leaf).__name__}. Return the parts of that object instead."
            )
        strange_keys = [key for key in path if type(key) not in JSON_TYPES]
        if strange_keys:
            raise TypeError(
                f"Keys of the state that heals replicas must be JSON values, got {type(strange_keys[0]).__name__} in "
                f"{_name(path)}."
            )

    _map_leaves(check, state)


def take(state: State) -> Snapshot:
    """Copy `state`, so that it may change while the copy travels."""
    layouts: dict[Path, Layout] = {}

    def copied(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        layouts[path] = _layout(leaf)
        return _local(leaf).to("cpu", copy=True)

    return Snapshot(_map_leaves(copied, state), layouts)


def put_together(snapshot: Snapshot, meshes: dict[MeshKey, DeviceMesh]) -> State:
    """Return the state that was taken, on this rank's devices and on `meshes`.

    Raises ValueError for a tensor that was split over a mesh which this replica has not.
    """

    def placed(path: Path, leaf: Any) -> Any:
        layout = snapshot.layouts.get(path)
        if layout is None:
            return leaf
        local = leaf.to(layout.device_type, copy=True)  # what was received is read-only
        if layout.split is None:
            return local
        split = layout.split
        if split.mesh not in meshes:
            raise ValueError(
                f"Got {_name(path)} split over the mesh {split.mesh}; here there are {list(meshes)}. All replicas need "
                "the same mesh inside. Start them with the same number of ranks and the same degrees of parallelism."
            )
        mesh = meshes[split.mesh]
        return DTensor.from_local(local, mesh, split.placements, shape=split.shape, stride=split.stride)

    return dict(_map_leaves(placed, snapshot.values))


def meshes_of(state: State) -> dict[MeshKey, DeviceMesh]:
    """Return the meshes on which the `DTensor`s of `state` live."""
    return {_mesh_key(leaf.device_mesh): leaf.device_mesh for leaf in _leaves(state) if isinstance(leaf, DTensor)}


def shapes_of(state: State) -> list[Any]:
    """Return name, shape, dtype and mesh of each tensor of `state`, as JSON values."""
    told: list[Any] = []

    def tell(path: Path, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            mesh = _mesh_key(leaf.device_mesh) if isinstance(leaf, DTensor) else None
            told.append([_name(path), list(leaf.shape), str(leaf.dtype), mesh])

    _map_leaves(tell, state)
    return told


def _mesh_key(mesh: DeviceMesh) -> MeshKey:
    names = mesh.mesh_dim_names
    return (tuple(names) if names is not None else None, tuple(mesh.shape))


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _layout(tensor: Tensor) -> Layout:
    split = None
    if isinstance(tensor, DTensor):
        split = Split(_mesh_key(tensor.device_mesh), tuple(tensor.placements), tensor.shape, tensor.stride())
    return Layout(tensor.device.type, split)


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
