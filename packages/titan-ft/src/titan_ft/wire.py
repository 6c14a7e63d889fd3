"""States as bytes: one JSON header, then the tensors' raw bytes. Nothing in them can be executed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from titan_ft.snapshot import JSON_TYPES, PLACEMENTS, Layout, Snapshot, Split

MAGIC = b"TITANFT1"
MAX_HEADER_BYTES = 1 << 28
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def packed(state: Any) -> tuple[bytes, list[Tensor]]:
    """Return the header of a nested state of dictionaries, lists, JSON values, tensors and snapshots; its tensors."""
    tensors: list[Tensor] = []
    tree = _encoded(state, tensors)
    told = [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]
    header = json.dumps({"tree": tree, "tensors": told}).encode()
    return MAGIC + struct.pack("<Q", len(header)) + header, tensors


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def unpacked(
    read: Callable[[int], bytes], read_into: Callable[[memoryview], int], check: Callable[..., None] = lambda *_: None
) -> Any:
    """Read a state. `read(n)` returns n bytes or fewer at the end; `read_into` fills a buffer, as `io.RawIOBase`.

    `check(part, *pieces)` is called after each part was read, and before it is used: part 0 is the header, part n the
    n-th tensor. Raises ValueError for bytes that are no state, or that end too early.
    """
    head = read(len(MAGIC) + 8)
    if len(head) != len(MAGIC) + 8 or not head.startswith(MAGIC):
        raise ValueError("The healing stream must begin with a header of titan-ft, got something else.")
    (length,) = struct.unpack("<Q", head[len(MAGIC) :])
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"The header of a healing stream must be at most {MAX_HEADER_BYTES} bytes, got {length}.")
    content = read(length)
    if len(content) != length:
        raise ValueError(f"The healing stream ended early: {len(content)} of {length} bytes of its header.")
    check(0, head, content)
    try:
        header = json.loads(content)
        tensors: list[Tensor] = []
        for dtype, shape in header["tensors"]:
            tensors.append(_received(dtype, shape, read_into))
            check(len(tensors), raw(tensors[-1]))
        return _decoded(header["tree"], tensors)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"The header of a healing stream must describe a state, got a bad one: {error!r}.") from error


def _received(name: str, shape: list[int], read_into: Callable[[memoryview], int]) -> Tensor:
    dtype = _DTYPES[name]
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"The shape of a tensor must be integers of at least 0, got {shape}.")
    tensor = torch.empty(shape, dtype=dtype)
    view, done = raw(tensor), 0
    while done < len(view):
        count = read_into(view[done:])
        if not count:
            raise ValueError(f"The healing stream ended early: {done} of {len(view)} bytes of a tensor.")
        done += count
    return tensor


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Snapshot):
        layouts = [[list(path), _layout(layout)] for path, layout in value.layouts.items()]
        return {"snapshot": _encoded(value.values, tensors), "layouts": layouts}
    if isinstance(value, dict):
        return {"dict": [[key, _encoded(each, tensors)] for key, each in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(each, tensors) for each in value]}
    if type(value) in JSON_TYPES:
        return value
    raise TypeError(f"The state that heals replicas must hold tensors and JSON values, got {type(value).__name__}.")


def _decoded(tree: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree))
    content = tree[kind]
    if kind == "tensor":
        return tensors[content]
    if kind == "snapshot":
        return Snapshot(_decoded(content, tensors), {tuple(p): _layout_of(told) for p, told in tree["layouts"]})
    if kind == "dict":
        return {key: _decoded(each, tensors) for key, each in content}
    items: Iterator[Any] = (_decoded(each, tensors) for each in content)
    return {"list": list, "tuple": tuple}[kind](items)


def _layout(layout: Layout) -> Any:
    split = layout.split
    if split is None:
        return [layout.device_type, None]
    placements = [_placement(each) for each in split.placements]
    return [layout.device_type, [list(split.mesh), placements, list(split.shape), list(split.stride)]]


def _layout_of(told: Any) -> Layout:
    device_type, split = told
    if split is None:
        return Layout(device_type, None)
    (names, sizes), placements, shape, stride = split
    mesh = (None if names is None else tuple(names), tuple(sizes))
    return Layout(device_type, Split(mesh, tuple(map(_placement_of, placements)), torch.Size(shape), tuple(stride)))


def _placement(placement: Placement) -> list[Any]:
    kind = type(placement).__name__  # exactly: a subclass may mean something else
    if kind not in PLACEMENTS:
        raise TypeError(f"A placement must be one of {', '.join(PLACEMENTS)}, got {placement}.")
    names = {"Shard": ("dim",), "_StridedShard": ("dim", "split_factor"), "Partial": ("reduce_op",)}.get(kind, ())
    return [kind, *(getattr(placement, name) for name in names)]


def _placement_of(told: list[Any]) -> Placement:
    kind, *rest = told
    if kind == "_StridedShard":  # of FSDP over tensor parallelism
        from torch.distributed.tensor.placement_types import _StridedShard

        return _StridedShard(rest[0], split_factor=rest[1])
    kinds: dict[str, Callable[..., Placement]] = {"Shard": Shard, "Partial": Partial, "Replicate": Replicate}
    return kinds[kind](*rest)
